"""Runs setup.py for 64-bit ARM on another machine, with Debian's cross compiler, for `make arm`.

    python tests/arm/build.py FOLDER

FOLDER is what prepare.sh made. The package goes to FOLDER/lib, for the Python and the torch in FOLDER.
"""

from __future__ import annotations

import os
import platform
import runpy
import sys
from pathlib import Path

from torch.utils import cpp_extension

TRIPLET = "aarch64-linux-gnu"
PYTHON = "3.11"  # Debian's, in FOLDER

folder = Path(sys.argv[1]).resolve()
torch = folder / "site" / "torch"
headers = folder / "root" / "usr" / "include"
os.environ |= {
    "CC": f"{TRIPLET}-gcc",
    "CXX": f"{TRIPLET}-g++",
    "LDSHARED": f"{TRIPLET}-gcc -shared",
    # Behind the compiler's own: of the C library's headers there are two copies.
    "CFLAGS": f"-I{headers}/python{PYTHON} -idirafter {headers}",
    "SETUPTOOLS_EXT_SUFFIX": f".cpython-{PYTHON.replace('.', '')}-{TRIPLET}.so",
    "PRUNED_OPS_BUILD_CUDA": "0",
}
platform.machine = lambda: "aarch64"
cpp_extension._TORCH_PATH, cpp_extension.TORCH_LIB_PATH = str(torch), str(torch / "lib")
sys.argv = ["setup.py", "-q", "build", f"--build-base={folder / 'build'}", f"--build-lib={folder / 'lib'}"]
runpy.run_path(str(Path(__file__).resolve().parents[2] / "setup.py"), run_name="__main__")
