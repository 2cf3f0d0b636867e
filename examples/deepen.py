"""A checkpoint with more layers that says what it said: the new ones begin as the identity, and training makes something of them.

    python examples/deepen.py sudoku runs/deeper --behind 3 --layers 3
    python examples/train.py sudoku-further --data runs/sudoku.npz --out runs/further --init runs/deeper

New layers stand behind the first `--behind` ones and are copies of those that followed these, with the norms behind their attention and
their MLP at zero, so that they add nothing until training moves them (LLaMA Pro, Wu et al. 2024, arXiv 2401.02415, zeroes the last
projections instead).
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, default_checkpoint

LAYER = re.compile(r"(model\.(?:decoder|encoder\.language_model)\.layers\.)(\d+)\.(.*)")
WHAT_IT_ADDS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")


def deepened(model: DiffusionGemmaForMaskedBlockLM, behind: int, layers: int) -> DiffusionGemmaForMaskedBlockLM:
    """A model with `layers` more behind the first `behind`, whose logits are the same.

    Raises:
        ValueError: there are not as many layers behind that place to copy.
    """
    settings = model.config.to_dict()
    text = settings["text_config"]
    count = text["num_hidden_layers"]
    if not (0 <= behind and 1 <= layers <= count - behind):
        raise ValueError(
            f"`behind` is {behind} and `layers` {layers}; expected `layers` of at least 1, and both together at most the {count} layers "
            "there are: those behind that place are copied"
        )
    order = [*range(behind + layers), *range(behind, count)]  # of each layer, the one it is a copy of
    own = {int(layer): sizes for layer, sizes in text["per_layer_config"].items()}
    text["per_layer_config"] = {place: own[layer] for place, layer in enumerate(order) if layer in own}
    text["layer_types"], text["num_hidden_layers"] = [text["layer_types"][layer] for layer in order], len(order)
    deeper = DiffusionGemmaForMaskedBlockLM(type(model.config).from_dict(settings)).to(model.dtype).eval()
    weights = model.state_dict()
    with torch.no_grad():
        for name, value in deeper.state_dict().items():
            found = LAYER.fullmatch(name)
            if found is None:
                value.copy_(weights[name])
                continue
            stack, layer, inner = found[1], int(found[2]), found[3]
            new = behind <= layer < behind + layers
            if new and inner in WHAT_IT_ADDS:
                value.zero_()
            elif new and inner == "layer_scalar":
                value.fill_(1.0)
            else:
                value.copy_(weights[f"{stack}{order[layer]}.{inner}"])
    deeper.generation_config = model.generation_config
    return deeper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="name of a shipped one, or a folder")
    parser.add_argument("out", help="folder of the deeper one")
    parser.add_argument("--behind", type=int, default=3, help="put the new layers behind so many (3)")
    parser.add_argument("--layers", type=int, default=3, help="how many new ones (3)")
    args = parser.parse_args()
    source = args.checkpoint if Path(args.checkpoint).is_dir() else default_checkpoint(args.checkpoint)
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(source)
    deeper = deepened(model, args.behind, args.layers)
    deeper.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(source).save_pretrained(args.out)
    for one in (model, deeper):
        print(f"{one.num_parameters():,} parameters in {one.config.text_config.num_hidden_layers} layers")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
