"""Package metadata. No hardware probing and no work at import: `pip install` must behave the same on every machine."""

from pathlib import Path

from setuptools import find_packages, setup

DALI = 'nvidia-dali-cuda120>=2.4; sys_platform == "linux"'
TABLES = ["pyarrow>=16"]
EVAL = ["scikit-learn>=1.5"]
EXPORT = ["timm>=1.0", "transformers>=4.56"]

setup(
    name="fastjepa",
    version="0.1.0",
    description="A performance-focused, kernel-optimised trainer for I-JEPA",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ is a folder, not a package: an import package named "kernels" would shadow the one that transformers uses.
    packages=find_packages(include=["fastjepa", "fastjepa.*"]) + find_packages("kernels"),
    package_dir={"fastjepa_kernels": "kernels/fastjepa_kernels"},
    package_data={
        "fastjepa": ["py.typed", "data/embedded/*", "profiling/report.html"],
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
            "hypothesis>=6",
            "import-linter>=2",
            "matplotlib>=3.9",
            "ml_dtypes>=0.5",
            "mypy>=1.13",
            "pytest>=8",
            "pytest-timeout>=2",
            "pytest-xdist>=3",
            "ruff>=0.9",
            "scipy>=1.13",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["fastjepa=fastjepa.__main__:main", "fastjepa-train=fastjepa.train:main"]},
)
