"""Try what people put beside guidance on a small pipeline of several families, and write what came of it to
docs/families.md: caching, offloading, compiling; and networks of which the weights are quantised.

    python scripts/make_beside.py
    python scripts/make_beside.py quantised     # needs torchao, gguf and bitsandbytes
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
from diffusers import BitsAndBytesConfig, GGUFQuantizationConfig, TorchAoConfig  # noqa: E402
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig  # noqa: E402

from difftune.configs.recipes import DPOConfig  # noqa: E402
from difftune.files.output import write  # noqa: E402
from difftune.recipes import train  # noqa: E402
from guidance.attach.handle import attach  # noqa: E402
from guidance.methods.cfg import CFG  # noqa: E402
from rewards.simple import Brightness  # noqa: E402
from solvers.families.table import family_of  # noqa: E402
from solvers.latent import LatentModel  # noqa: E402
from tests.guidance.methods.test_conformance import KINDS, OF_KIND, SCALE, SCHEDULERS, run  # noqa: E402
from tests.support.families import EVERY  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- made by scripts/make_beside.py -->", "<!-- end of what was tried -->"
QUANTISED = ("<!-- made by scripts/make_beside.py quantised -->", "<!-- end of what was quantised -->")
TRIED = ("flux", "qwen", "wan")
CPU = torch.device("cpu")


def cached(config: Any) -> Callable[[Any, str], None]:
    return lambda pipe, name: pipe.components[name].enable_cache(config)


def broadcast(pipe: Any, name: str) -> None:
    """Pyramid Attention Broadcast, which asks the pipeline for its timestep."""
    told = {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 2}
    config = PyramidAttentionBroadcastConfig(**told, current_timestep_callback=lambda: pipe.current_timestep)
    pipe.components[name].enable_cache(config)


def traced(pipe: Any, name: str) -> None:
    torch._dynamo.reset()
    pipe.components[name].compile(backend="eager")


def offloaded(kind: str) -> Callable[[Any, str], None]:
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    return lambda pipe, name: pipe.components[name].enable_group_offload(CPU, CPU, offload_type=kind, **groups)


BESIDE: dict[str, Callable[[Any, str], None]] = {
    "FirstBlockCache": cached(FirstBlockCacheConfig()),
    "PAB": broadcast,
    "TaylorSeer": cached(TaylorSeerCacheConfig()),
    "torch.compile, traced": traced,
    "group offload, blocks": offloaded("block_level"),
    "group offload, leaves": offloaded("leaf_level"),
}


def tried(kind: str, change: Callable[[Any, str], None]) -> str:
    """What `attach(CFG)` gives beside the change, against the pipeline with it: or the first words of the error."""
    pipe = KINDS[kind].make(SCHEDULERS[OF_KIND[kind][0]](), num_layers=2)  # a head and a tail for the cache
    try:
        change(pipe, family_of(pipe).denoisers[0])
        stock = run(kind, pipe)
    except Exception as error:  # diffusers has none for this network
        return f"diffusers: {type(error).__name__}"
    try:
        with attach(pipe, CFG(SCALE)):
            ours = run(kind, pipe)
    except ValueError as refusal:
        return "one sentence" if "disable_cache" in str(refusal) else f"refused: {refusal}"
    if torch.equal(ours, stock):
        return "bit-equal"
    return f"differs by {float((ours - stock).abs().max() / stock.abs().max()):.0e}"


def block() -> str:
    """The table as it stands in the page."""
    heads = ["family", *BESIDE]
    lines = [
        heads,
        ["---"] * len(heads),
        *([f"`{kind}`", *(tried(kind, c) for c in BESIDE.values())] for kind in TRIED),
    ]
    return "\n\n".join([BEGIN, "\n".join(f"| {' | '.join(line)} |" for line in lines), END])


# ------------------------------------------------------------------------------------------------ quantised weights
def by_config(config: Callable[[], Any]) -> Callable[[Any, str], Any]:
    """A network loaded again from its folder by diffusers, quantised."""
    return lambda network, folder: type(network).from_pretrained(folder, quantization_config=config())


def eight_bits() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def by_gguf(network: Any, folder: str) -> Any:
    """A network loaded from a file of llama.cpp's format, the matrices of whose blocks are in 8 bits."""
    import gguf

    file, eight = Path(folder, "weights.gguf"), gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(file), "difftune")
    for name, value in network.state_dict().items():
        fits = value.ndim == 2 and value.shape[1] % 32 == 0 and "blocks" in name
        data = gguf.quants.quantize(value.numpy(), eight) if fits else value.numpy()
        writer.add_tensor(name, data, raw_dtype=eight if fits else None)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    quantised = GGUFQuantizationConfig(compute_dtype=torch.float32)
    return type(network).from_single_file(str(file), quantization_config=quantised, config=folder)


LOADERS: dict[str, Callable[[Any, str], Any]] = {
    "torchao, int8": by_config(eight_bits),
    "GGUF, Q8_0": by_gguf,
    "bitsandbytes, nf4": by_config(lambda: BitsAndBytesConfig(load_in_4bit=True)),
    "bitsandbytes, int8": by_config(lambda: BitsAndBytesConfig(load_in_8bit=True)),
}


def quantised(kind: str, load: Callable[[Any, str], Any]) -> str:
    """What `attach(CFG)` and a step of DPO give on a quantised network."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = EVERY[kind].make()
        pipe.scheduler = SCHEDULERS[OF_KIND[kind][0]]()
        pipe.transformer.save_pretrained(folder)
        try:
            pipe.register_modules(transformer=load(pipe.transformer, folder))
        except Exception as error:  # diffusers' own condition
            return f"diffusers: {' '.join(str(error).split())[:60]}"
        stock = run(kind, pipe)
        with attach(pipe, CFG(SCALE)):
            equal = torch.equal(run(kind, pipe), stock)
        return f"{'bit-equal' if equal else 'differs'}, {'trains' if learns(pipe, folder) else 'does not train'}"


def learns(pipe: Any, folder: str) -> bool:
    """Whether a step of DPO moves the LoRA."""
    prompts = Path(folder, "prompts.txt")
    prompts.write_text("red circle\n")
    config = DPOConfig(prompts=str(prompts), max_train_steps=1, train_batch_size=1, num_inference_steps=2)
    ((_, state),) = train(replace(config, beta=10.0), None, pipe, Brightness())
    ups = [value for name, value in state.tensors.items() if "lora_B" in name]  # zero before
    return all(bool(value.isfinite().all()) for value in ups) and any(bool(value.any()) for value in ups)


def quantised_block() -> str:
    heads = ["family", *LOADERS]
    rows = [
        heads,
        ["---"] * len(heads),
        *([f"`{k}`", *(quantised(k, load) for load in LOADERS.values())] for k in TRIED),
    ]
    return "\n\n".join([QUANTISED[0], "\n".join(f"| {' | '.join(row)} |" for row in rows), QUANTISED[1]])


def main() -> None:
    warnings.simplefilter("ignore")
    begin, end, made = BEGIN, END, block
    if "quantised" in sys.argv[1:]:
        LatentModel.size = lambda self, height=None, width=None: (height or 32, width or 32)  # type: ignore[method-assign]
        (begin, end), made = QUANTISED, quantised_block
    before, _, rest = PAGE.read_text().partition(begin)
    write(PAGE, (before + made() + rest.partition(end)[2]).encode())


if __name__ == "__main__":
    main()
