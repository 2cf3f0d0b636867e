"""Installs two import packages, `modeling_diffusiongemma` and `generation`, and the checkpoints shipped inside the first."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
CARDS = ("text", "sudoku", "decisions", "tools")  # of the checkpoints that are shipped


def package_page(text: str) -> str:
    """A document where none of the files beside it are: without its picture and without links to them."""
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


class BuildWithCards(build_py):
    """Puts each shipped checkpoint's card beside its weights, where a model's card is looked for."""

    def run(self) -> None:
        super().run()
        for name in () if self.editable_mode else CARDS:
            target = Path(self.build_lib, "modeling_diffusiongemma", "checkpoints", name, "README.md")
            card = (HERE / "model_cards" / f"{name}.md").read_text(encoding="utf-8")
            target.write_text(package_page(card), encoding="utf-8")


images = ["pillow", "torchvision"]  # transformers' Gemma4Processor needs torchvision for its video part
train = ["datasets", "tqdm", "matplotlib", "peft"]
serve = ["openai>=3.54,<4", "fastapi>=0.165,<1", "uvicorn>=0.54,<1", "starlette", "pydantic>=2", "rich"]  # transformers' "serving"
diffusers = ["diffusers>=0.42.1,<0.43"]  # drives the model by names of transformers' class: modeling_diffusiongemma/drop_in
lm_eval = ["lm-eval>=0.4.13,<0.5"]
test = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "datasets", "packaging", "pillow", "peft"]

setup(
    name="modeling-diffusiongemma",
    version="0.1.0",
    description="DiffusionGemma for Hugging Face Transformers: model, training loss and block-diffusion generation",
    long_description=package_page((HERE / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["modeling_diffusiongemma*", "generation*"]),
    package_data={
        "generation": ["README.md"],
        "modeling_diffusiongemma": [f"checkpoints/*/*.{suffix}" for suffix in ("json", "safetensors", "jinja")],
    },
    entry_points={"console_scripts": ["diffusiongemma = modeling_diffusiongemma.console.main:main"]},
    cmdclass={"build_py": BuildWithCards},
    zip_safe=False,
    install_requires=[  # upper bounds: what was tested
        "torch>=2.11,<2.16",
        "transformers>=5.17,<5.25",
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
