"""Writes the bundled heads of the aesthetic predictors, each as one affine map in float64.

    python scripts/make_aesthetic.py --sac FILE --ava FILE --v1 FILE

The files are the published ones: sac+logos+ava1-l14-linearMSE.pth and ava+logos-l14-linearMSE.pth of
https://github.com/christophschuhmann/improved-aesthetic-predictor (Apache-2.0), and sa_0_4_vit_l_14_linear.pth of
https://github.com/LAION-AI/aesthetic-predictor (MIT). `rewards/lock.json` has the hashes of the first two. One that is
not given stays as it is bundled.
"""

import argparse

from safetensors.torch import load_file, save_file

from rewards import hub
from rewards.learned.aesthetic import BUNDLED, head_of

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("sac", "ava", "v1"):
        parser.add_argument(f"--{name}", help="the published file")
    found = load_file(BUNDLED) if BUNDLED.is_file() else {}
    for name, file in vars(parser.parse_args()).items():
        if file is not None:
            ((weight, bias),) = head_of(hub.read(file))
            found |= {f"{name}.weight": weight.contiguous(), f"{name}.bias": bias}
    save_file(found, BUNDLED, metadata={"licence": "sac, ava: Apache-2.0; v1: MIT"})
