"""Package metadata. No hardware probing and no work at import: `pip install` must behave the same on every machine."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The version stands in fastjepa/__init__.py alone, and is read as text: a build imports nothing of what it builds.
(VERSION,) = re.findall(
    r'^__version__ = "(.+)"$', (ROOT / "src/fastjepa/__init__.py").read_text(encoding="utf-8"), re.M
)

DALI = 'nvidia-dali-cuda120>=2.4; sys_platform == "linux"'
TABLES = ["pyarrow>=16"]
EVAL = ["scikit-learn>=1.5"]
EXPORT = ["timm>=1.0", "transformers>=4.56"]

setup(
    name="fastjepa",
    version=VERSION,
    description="A performance-focused, kernel-optimised trainer for I-JEPA",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # src/ holds nothing but links to the two packages. As their only parent it makes setuptools write its path, and no
    # finder, into the environment of `pip install -e`. A finder comes last, after Python has taken a folder that is named
    # fastjepa, such as the clone itself, for a namespace package. The path of the repository or of kernels/ instead would
    # make `tests`, `benchmarks` and `kernels`, the name of a package that transformers looks for, importable everywhere.
    packages=find_packages("src"),
    package_dir={"": "src"},
    package_data={
        # fastjepa/configs is a link to configs/.
        "fastjepa": ["py.typed", "configs/**/*.yaml", "configs/**/*.json", "data/embedded/*", "profiling/report.html"],
        "fastjepa_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.13",  # the oldest that was tried
        'triton>=3.5; sys_platform == "linux"',
        "deepspeed>=0.19.8",  # 0.18.3-0.19.3 give wrong gradients for modules that are used twice in a step
        "numpy>=1.26",
        "pillow>=10",
        "pyyaml>=6",
        "safetensors>=0.4",
        "simplejpeg>=1.8",
        "tqdm>=4.66",
    ],
    extras_require={
        "dali": [DALI],
        "gpu": [DALI, "xformers>=0.0.35"],
        "tables": TABLES,
        "eval": EVAL,
        "export": EXPORT,
        "dev": [
            DALI,
            *TABLES,
            *EVAL,
            "codespell>=2.4",
            "hypothesis>=6",
            "import-linter>=2",
            "matplotlib>=3.9",
            "ml_dtypes>=0.5",
            "mypy>=1.13",
            "pre-commit>=4",
            "pytest>=8",
            "pytest-timeout>=2",
            "pytest-xdist>=3",
            "ruff>=0.9",
            "scipy>=1.13",
            "setuptools>=77",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["fastjepa=fastjepa.__main__:main", "fastjepa-train=fastjepa.train:main"]},
)
