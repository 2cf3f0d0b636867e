"""Installs two import packages, `modeling_diffusiongemma` and `generation`, and the checkpoints shipped inside the first."""

from pathlib import Path

from setuptools import setup

readme = Path(__file__).parent / "README.md"

train = ["datasets", "tqdm"]
test = ["pytest", "pytest-timeout", "datasets", "packaging", "peft"]

setup(
    name="modeling-diffusiongemma",
    version="0.1.0",
    description="DiffusionGemma for Hugging Face Transformers: model, training loss and block-diffusion generation",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=["modeling_diffusiongemma", "generation"],
    package_data={
        "modeling_diffusiongemma": [f"checkpoints/*/*.{suffix}" for suffix in ("json", "safetensors", "jinja", "md")],
    },
    zip_safe=False,
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "accelerate>=1.0",
        "safetensors",
        "tokenizers",
        "numpy",
    ],
    extras_require={
        "train": train,
        "4bit": ["bitsandbytes"],
        "test": test,
        "dev": [*test, "ruff"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
