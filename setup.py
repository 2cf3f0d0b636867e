"""Installs two import packages, `modeling_diffusiongemma` and `generation`, and the checkpoints shipped inside the first."""

from pathlib import Path

from setuptools import setup

readme = Path(__file__).parent / "README.md"

images = ["pillow", "torchvision"]  # transformers' Gemma4Processor needs torchvision for its video part
train = ["datasets", "tqdm"]
serve = ["openai>=3.54,<4", "fastapi>=0.165,<1", "uvicorn>=0.54,<1", "starlette", "pydantic>=2", "rich"]  # transformers' "serving"
diffusers = ["diffusers>=0.42.1,<0.43"]  # drives the model by names of transformers' class: modeling_diffusiongemma/views.py
lm_eval = ["lm-eval>=0.4.13,<0.5"]
test = ["pytest", "pytest-timeout", "datasets", "packaging", "pillow", "peft"]

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
    entry_points={"console_scripts": ["diffusiongemma = modeling_diffusiongemma.console:main"]},
    zip_safe=False,
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "accelerate>=1.0",
        "huggingface_hub",
        "safetensors",
        "tokenizers",
        "numpy",
    ],
    extras_require={
        "images": images,
        "train": train,
        "serve": serve,
        "diffusers": diffusers,
        "lm-eval": lm_eval,
        "4bit": ["bitsandbytes"],
        "test": test,
        "bench": ["matplotlib"],
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
