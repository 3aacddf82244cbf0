"""Which formulation of the paper's convolutions is fastest, for one model and for ten at once?

    OMP_NUM_THREADS=1 python experiments/benchmarks/formulations.py

Each layer of the tables, as torch computes it, in channels-last memory, as a 2×2 convolution with
four times the channels, as a matrix product, and as ``pyro_gpvae`` does: forward and backward, the
weights of ten models by ``vmap`` beside ten layers in turn, and forward only, as in evaluation.
Then the whole networks, with torch's own layers and with ours. Freed memory is kept, as ``fit``
does it. JSON and Markdown are written to --out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from _bench import Ceilings, Options, Program, interleave
from _report import Report
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from pyro_gpvae import build_decoder, build_encoder
from pyro_gpvae.core._allocator import keep_freed_memory
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.model._convolutions import ConvTranspose2d
from pyro_gpvae.model.networks import ImageShape, feature_dim

TORCH, OURS, TURNS = "torch", "ours", "torch, in turn"

#: Of a layer, whose methods are those of its class, and its input.
Formula = Callable[[Any, Tensor], Tensor]


@dataclass(kw_only=True)
class FormulationOptions(Options):
    """Options of the measurement.

    Attributes:
        image_shapes: Shapes (C, H, W) of images: Table 1 is (1, 28, 28), Table 2 (3, 32, 32).
        latent_dim: Dimension p of z.
        batch_size: Images per step and model.
        models: How many models are stacked.
        latents: Latent vectors that are decoded at once in evaluation.
    """

    rounds: int = 15
    seconds: float = 0.03
    image_shapes: tuple[ImageShape, ...] = ((1, 28, 28), (3, 32, 32))
    latent_dim: int = 50
    batch_size: int = 128
    models: int = 10
    latents: int = 640


def main(options: FormulationOptions) -> None:
    if options.on().type == "cpu":
        keep_freed_memory()
    report = Report(
        "formulations",
        "Formulations of the networks",
        options,
        f"Networks of the paper's tables, p = {options.latent_dim}, random images. Training: "
        f"forward and backward, B = {options.batch_size}; the gradient in the images is left out. "
        f"Stacked: the same for {options.models} models at once by vmap, beside one after the "
        f"other. Evaluation: {options.latents} latent vectors, no gradients.",
        Ceilings.measure(options.on()),
    )
    for shape in options.image_shapes:
        with seeded(options.seed, options.on()):
            measure(report, options, shape)
    report.write()


def measure(report: Report, options: FormulationOptions, shape: ImageShape) -> None:
    """Adds the tables of one pair of networks."""
    device = options.on()
    title = "×".join(map(str, shape))
    encoder = build_encoder(shape)
    head = nn.Linear(feature_dim(encoder, shape), options.latent_dim)
    decoder = build_decoder(shape, options.latent_dim)
    network = nn.Sequential(encoder, head, decoder).to(device)
    x = torch.rand(options.batch_size, *shape, device=device)
    z = torch.randn(options.latents, options.latent_dim, device=device)

    first = True
    for number, (layer, inputs) in enumerate(convolutions(network, x), 1):
        name = f"{title}, layer {number}: {layer.in_channels} to {layer.out_channels} channels"
        formulas = formulas_of(layer)
        baselines = {"training": TORCH, "stacked": TURNS, "evaluation": TORCH}
        programs: dict[str, dict[str, Program]] = {
            "training": {k: training(layer, f, inputs, not first) for k, f in formulas.items()},
            "stacked": {TURNS: in_turn(layer, inputs, not first, options.models)},
            "evaluation": {},
        }
        for key, formula in formulas.items():
            program = stacked(layer, formula, inputs, not first, options.models)
            programs["stacked"][key] = program
            if isinstance(layer, nn.ConvTranspose2d):
                rows = inputs[:1].expand(options.latents, -1, -1, -1).contiguous()
                programs["evaluation"][key] = evaluation(layer, formula, rows)
        for kind, found in programs.items():
            add(report, options, f"{name}, {kind}", found, baselines[kind])
        first = False

    plain = torchs_own(network)
    in_place = copy.deepcopy(network)
    for module in in_place.modules():
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.inplace = True
    networks = {
        TORCH: plain,
        OURS: network,
        "ours, activations in place": in_place,
        "torch, channels last": weights_channels_last(plain),
        "ours, channels last": weights_channels_last(network),
    }
    steps = {k: training(m, nn.Module.__call__, x, False) for k, m in networks.items()}
    add(report, options, f"{title}, whole, training", steps, TORCH)
    stacks = {TURNS: in_turn(plain, x, False, options.models)}
    for key, module in ((TORCH, plain), (OURS, network)):
        stacks[key] = stacked(module, nn.Module.__call__, x, False, options.models)
    add(report, options, f"{title}, whole, stacked", stacks, TURNS)
    decoders = {k: evaluation(m[2], nn.Module.__call__, z) for k, m in networks.items()}
    compiled: Any = torch.compile(network[2], fullgraph=True, dynamic=False)
    decoders["ours, compiled"] = evaluation(compiled, nn.Module.__call__, z)
    add(report, options, f"{title}, decoder, evaluation", decoders, TORCH)


def add(
    report: Report,
    options: FormulationOptions,
    name: str,
    programs: dict[str, Program],
    baseline: str,
) -> None:
    if programs:
        timings = interleave(programs, options.on(), options, warm_up=2)
        report.tables[name] = timings.table(baseline)
        report.record[name] = timings.seconds


def convolutions(network: nn.Module, x: Tensor) -> list[tuple[Any, Tensor]]:
    """All layers of the network that are convolutions, with the inputs that they get."""
    found: list[tuple[Any, Tensor]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        found.append((layer, inputs[0].detach().clone()))

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    network(x)
    for handle in handles:
        handle.remove()
    return found


def torchs_own(network: nn.Sequential) -> nn.Sequential:
    """A copy with torch's layers, as one would write it by hand."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, ConvTranspose2d):
            module.__class__ = nn.ConvTranspose2d  # type: ignore[assignment]
    return network


def weights_channels_last(network: nn.Sequential) -> nn.Sequential:
    """A copy with all weights in channels-last memory, which activations then follow."""
    network = copy.deepcopy(network)
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def formulas_of(layer: nn.Module) -> dict[str, Formula]:
    if isinstance(layer, nn.Conv2d):
        return {
            TORCH: nn.Conv2d.forward,
            "channels last": lambda conv, x: nn.Conv2d.forward(conv, channels_last(x)),
            "2×2 convolution": two_by_two,
            "matrix product": product,
        }
    return {
        TORCH: nn.ConvTranspose2d.forward,
        "channels last": lambda conv, x: nn.ConvTranspose2d.forward(conv, channels_last(x)),
        "2×2 convolution": ConvTranspose2d._subpixel,
        "matrix product": ConvTranspose2d._columns,
        OURS: ConvTranspose2d.forward,
    }


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def two_by_two(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution with kernel 4, stride 2 and padding 1, with every 2×2 pixels as one."""
    (fan_out, fan_in), (rows, columns) = layer.weight.shape[:2], (n // 2 for n in x.shape[2:])
    missing = (2 * columns + 1 - x.shape[3], 2 * rows + 1 - x.shape[2])
    x = functional.pad(x.movedim(1, -1), (0, 0, 1, missing[0], 1, missing[1]))
    x = x.reshape(len(x), rows + 1, 2, columns + 1, 2, fan_in).transpose(2, 3)
    x = x.reshape(len(x), rows + 1, columns + 1, 4 * fan_in).movedim(-1, 1)
    kernel = layer.weight.reshape(fan_out, fan_in, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1)
    kernel = kernel.reshape(fan_out, 2, 2, 4 * fan_in).movedim(-1, 1)
    return functional.conv2d(x, kernel, layer.bias)


def product(layer: Any, x: Tensor) -> Tensor:
    rows, columns = (n // 2 for n in x.shape[2:])
    patches = functional.unfold(x, 4, padding=1, stride=2)
    kernels = layer.weight.flatten(1).expand(len(x), -1, -1)
    y = torch.baddbmm(layer.bias[:, None], kernels, patches)
    return y.unflatten(2, (rows, columns))


def training(layer: nn.Module, formula: Formula, x: Tensor, inner: bool) -> Program:
    """Forward and backward; the gradient in x only for an inner layer."""
    x = x.detach().requires_grad_(inner)
    wanted = [*layer.parameters(), *([x] if inner else [])]
    gradient = torch.randn_like(layer(x).contiguous())
    return lambda: torch.autograd.grad(formula(layer, x), wanted, gradient)


def in_turn(layer: nn.Module, x: Tensor, inner: bool, models: int) -> Program:
    formula = formulas_of(layer)[TORCH] if hasattr(layer, "weight") else nn.Module.__call__
    steps = [training(copy.deepcopy(layer), formula, x.clone(), inner) for _ in range(models)]
    return lambda: [step() for step in steps]


class Formulated(nn.Module):
    """A layer computed by a formula, for ``functional_call``."""

    def __init__(self, layer: nn.Module, formula: Formula) -> None:
        super().__init__()
        self.layer, self.formula = layer, formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self.layer, x)


def stacked(layer: nn.Module, formula: Formula, x: Tensor, inner: bool, models: int) -> Program:
    module = Formulated(layer, formula)
    weights, _ = stack_module_state([copy.deepcopy(module) for _ in range(models)])
    x = x.expand(models, *x.shape).contiguous().requires_grad_(inner)
    wanted = [*weights.values(), *([x] if inner else [])]
    call = vmap(lambda parameters, images: functional_call(module, parameters, (images,)))
    gradient = torch.randn_like(call(weights, x).contiguous())
    return lambda: torch.autograd.grad(call(weights, x), wanted, gradient)


def evaluation(layer: nn.Module, formula: Formula, x: Tensor) -> Program:
    @torch.no_grad()
    def program() -> Tensor:
        return formula(layer, x)

    return program


if __name__ == "__main__":
    main(tyro.cli(FormulationOptions, description=__doc__))
