"""Pictures that pipelines begin from, and films of Wan: drawn from noise, written as .mp4, judged by their frames."""

import inspect

import diffusers
import pytest
import torch

from difftune.configs.images import SampleConfig
from difftune.errors import UserError
from difftune.files.films import mp4
from difftune.files.output import png
from difftune.files.pictures import read_picture
from difftune.pipelines import generate as generate_module
from difftune.pipelines.generate import Sampling, frames_for, generate, generate_batches, image_for
from guidance.methods.cfg import CFG, Plain
from rewards.simple import Brightness
from rewards.wrappers.frames import OverFrames
from tests.support import dits, pipelines


def test_a_film_is_drawn_from_its_noise_and_has_its_frames():
    pipe = dits.wan(dits.flow(), texts=True)
    noises = torch.randn(2, 16, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(num_inference_steps=2, num_frames=5)
    (batch,) = generate_batches(pipe, ["a red circle", "a square"], [0, 1], CFG(2.0), sampling, noises)
    call = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.0}
    stock = pipe(["a red circle", "a square"], latents=noises, output_type="pt", **call).frames
    assert batch.images.shape == (2, 3, 5, 16, 32) and batch.nfe == 4
    assert torch.equal(batch.images, stock.transpose(1, 2))


def test_films_are_asked_for_of_models_of_films():
    assert frames_for(dits.wan(), None) == {"num_frames": 1} and frames_for(pipelines.sd(), None) == {}
    with pytest.raises(UserError, match="num_frames is 6: give 1 more than a multiple of 4"):
        frames_for(dits.wan(), 6)
    with pytest.raises(UserError, match="StableDiffusionPipeline makes pictures: leave num_frames=5 out"):
        frames_for(pipelines.sd(), 5)


def test_a_picture_is_edited_by_pipelines_that_begin_from_one(tmp_path):
    (tmp_path / "a.png").write_bytes(png(torch.rand(16, 24, 3, generator=torch.Generator().manual_seed(0)).numpy()))
    parts = {name: part for name, part in dits.flux().components.items() if part is not None}
    pipe = diffusers.FluxImg2ImgPipeline(**parts)
    sampling = Sampling(num_inference_steps=2, image=str(tmp_path / "a.png"))
    pipe.default_sample_size = 8
    (batch,) = generate_batches(pipe, ["red"], [0], Plain(), sampling)
    assert image_for(pipe, sampling.image)["image"].size == (24, 16) and batch.images.shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="FluxImg2ImgPipeline begins from a picture: give its file as --image"):
        image_for(pipe, None)
    with pytest.raises(UserError, match="FluxInpaintPipeline fills a mask, which cannot be given here: attach to it"):
        image_for(diffusers.FluxInpaintPipeline(**parts), str(tmp_path / "a.png"))
    with pytest.raises(UserError, match="StableDiffusionPipeline takes no picture: leave --image out"):
        image_for(pipelines.sd(), str(tmp_path / "a.png"))


def kontext(monkeypatch):
    """At a size that a test can bear, in place of the one megapixel that it always draws."""
    kind = diffusers.FluxKontextPipeline
    call = kind.__call__.__wrapped__
    small = tuple(16 * 24 if default == 1024**2 else default for default in call.__defaults__)
    monkeypatch.setattr(call, "__defaults__", small)
    monkeypatch.setattr(inspect.getmodule(kind), "PREFERRED_KONTEXT_RESOLUTIONS", [(16, 24)])
    return kind(**{name: part for name, part in dits.flux().components.items() if part is not None})


def edit(monkeypatch):
    """As small, with texts of random numbers: like the processor of its text model, one picture goes with one text."""

    def texts(self, prompt, image, device):
        if len(prompt) != 1:
            raise ValueError(f"{len(prompt)} texts for a picture")
        return torch.randn(1, 6, dits.TEXT, generator=torch.Generator().manual_seed(len(prompt[0]))), torch.ones(1, 6)

    kind = diffusers.QwenImageEditPipeline
    monkeypatch.setattr(inspect.getmodule(kind), "calculate_dimensions", lambda area, ratio: (24, 16, None))
    monkeypatch.setattr(kind, "_get_qwen_prompt_embeds", texts)
    return kind(**{**dits.qwen().components, "processor": None})


@pytest.mark.parametrize("make", (kontext, edit))
def test_several_pictures_from_one(tmp_path, monkeypatch, make):
    """As `difftune sample --image` draws them: each is what it is alone."""
    (tmp_path / "a.png").write_bytes(png(torch.rand(16, 24, 3, generator=torch.Generator().manual_seed(0)).numpy()))
    pipe = make(monkeypatch)
    monkeypatch.setattr(generate_module, "open_pipeline", lambda *_: pipe)
    told = {"model": "none", "prompt": ["red"], "image": str(tmp_path / "a.png"), "num_inference_steps": 2}
    found = {}
    for seed, count in ((0, 2), (1, 1)):
        out = tmp_path / str(seed)
        generate(SampleConfig(**told, seed=seed, num_images=count, output_dir=str(out)), CFG(3.0))
        found[seed] = [read_picture(file) for file in sorted(out.glob("0*.png"))]
    assert [len(pictures) for pictures in found.values()] == [2, 1]
    assert (found[0][1] - found[1][0]).abs().max() < 0.01 < (found[0][0] - found[0][1]).abs().max()


def test_a_controlnet_without_its_picture_is_one_sentence():
    for kind, said in (
        (diffusers.StableDiffusionControlNetPipeline, "begins from a picture: give its file as --image"),
        (diffusers.FluxControlNetPipeline, "takes a control_image, which cannot be given here: attach to it in Python"),
    ):
        with pytest.raises(UserError, match=f"{kind.__name__} {said}"):
            image_for(object.__new__(kind), None)


def test_an_mp4_holds_the_frames(tmp_path):
    cv2 = pytest.importorskip("cv2")
    levels = torch.linspace(0.1, 0.9, 5)
    film = torch.stack([levels, levels.flip(0), torch.full((5,), 0.5)])[:, :, None, None].expand(3, 5, 32, 48)
    (tmp_path / "film.mp4").write_bytes(mp4(film))
    reader = cv2.VideoCapture(str(tmp_path / "film.mp4"))
    frames = [torch.from_numpy(frame).flip(2) for read, frame in iter(reader.read, (False, None)) if read]
    assert len(frames) == 5 and frames[0].shape == (32, 48, 3)
    found = torch.stack([frame.float().mean((0, 1)) / 255 for frame in frames], 1)
    assert (found - film[:, :, 0, 0]).abs().max() < 0.03  # of red, green and blue, frame by frame


def test_a_reward_over_frames_is_their_mean():
    film = torch.rand(2, 3, 9, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bright = Brightness()
    scores = OverFrames(bright, 3)(film, ["a", "b"])
    expected = torch.stack([bright(film[:, :, i], ["a", "b"]) for i in (0, 4, 8)]).mean(0)
    torch.testing.assert_close(scores, expected)
    (gradient,) = torch.autograd.grad(scores.sum(), film)
    assert gradient.flatten(3).any(3).any(1)[0].nonzero().flatten().tolist() == [0, 4, 8]
    assert torch.equal(OverFrames(bright)(film[:, :, 0], ["a", "b"]), bright(film[:, :, 0], ["a", "b"]))
    with pytest.raises(ValueError, match="frames is 0: give the frames that are scored"):
        OverFrames(bright, 0)
