"""From hidden states to losses: logits in tiles, and the kernel that writes none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_engine import sequences_of
from torch import Tensor

from pipeline import projection
from pipeline.engine import Engine
from pipeline.projection import LogitTransform


@pytest.mark.parametrize(("states", "width"), [(5, 32), (300, 576)])
def test_bfloat16_logits_are_float32_from_the_hidden_states_on(states: int, width: int) -> None:
    """The only rounding in half precision is the body's: the projection adds none of its own."""
    model = tiny_model("Llama", hidden_size=width, num_hidden_layers=1).bfloat16()
    engine = Engine(model)
    hidden = torch.randn(states, width).bfloat16()
    targets = torch.arange(states) % 600
    exact = hidden.double() @ model.lm_head.weight.double().T
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    rounding = 1e-6 * width / 32  # of so many float32 sums; bfloat16 logits would be off by 1e-2
    torch.testing.assert_close(
        engine._projection.nll(hidden, targets).double(), expected, rtol=1e-6, atol=rounding
    )


def test_tiles_of_the_vocabulary_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Gemma2", final_logit_softcapping=3.0)
    sequences = sequences_of([30, 7])
    whole = Engine(model).score(sequences)
    monkeypatch.setitem(projection._TILES, "cpu", (5, 17))
    for one, other in zip(whole, Engine(model).score(sequences), strict=True):
        assert one.nll_nats == pytest.approx(other.nll_nats, rel=1e-5)


@pytest.mark.parametrize("chunk", [100, 1000])
def test_a_target_that_cannot_be_is_infinitely_surprising(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(projection._TILES, "cpu", (64, chunk))
    model = tiny_model("Phi")
    with torch.no_grad():
        model.lm_head.bias[7] = -torch.inf  # entries that fill a vocabulary up
    found = projection.Projection(model).nll(torch.randn(2, 32), torch.tensor([7, 8]))
    assert found[0] == torch.inf
    assert torch.isfinite(found[1])


def test_the_loss_of_what_is_all_but_certain_keeps_its_digits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float32 knows logits of 20 to a millionth or two, and such losses are a thousandth."""
    monkeypatch.setitem(projection._TILES, "cpu", (64, 100))
    model = tiny_model("Llama")
    weight, targets = model.lm_head.weight.detach(), torch.arange(600)
    hidden = 20 * weight[targets] / weight[targets].square().sum(1, keepdim=True)
    exact = hidden.double() @ weight.double().T
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    assert 1e-4 < float(expected.median()) < 1e-2
    found = projection.Projection(model).nll(hidden, targets).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-7)


SIZES = ("states", "depth", "vocabulary", "biased", "transform")
ANY_KERNEL = [
    pytest.param(1, 64, 256, False, LogitTransform(), id="one-state"),
    pytest.param(129, 100, 1001, True, LogitTransform(0.25), id="odd-sizes-bias-scale"),
    pytest.param(7, 2304, 1000, False, LogitTransform(1.0, 30.0), id="soft-cap"),
]


@pytest.mark.parametrize(
    SIZES,
    [
        *ANY_KERNEL,
        pytest.param(1200, 64, 700, False, LogitTransform(), id="two-launches"),
        pytest.param(1100, 32, 300, False, LogitTransform(), id="more-tiles-than-a-group"),
    ],
)
def test_the_kernel_equals_float64(
    states: int,
    depth: int,
    vocabulary: int,
    biased: bool,
    transform: LogitTransform,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pipeline.projection_kernel

    launch = 1024 if states == 1200 else 8192
    monkeypatch.setattr(pipeline.projection_kernel, "_ROWS", launch)
    compare_triton(kernel_device, states, depth, vocabulary, biased, transform)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("states", "depth", "vocabulary", "transform"),
    [
        (300, 768, 50257, LogitTransform()),
        (8200, 576, 49152, LogitTransform()),
        (7, 2304, 256000, LogitTransform(1.0, 30.0)),
    ],
)
def test_the_kernel_equals_float64_at_full_size(
    states: int, depth: int, vocabulary: int, transform: LogitTransform
) -> None:
    compare_triton(torch.device("cuda"), states, depth, vocabulary, False, transform)


def compare_triton(device: torch.device, *sizes: Any) -> None:
    from pipeline.projection_kernel import cross_entropy

    # Triton's interpreter has no products of bfloat16.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    losses, expected = kernel_and_float64(cross_entropy, dtype, device, *sizes)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)


def kernel_and_float64(
    cross_entropy: Callable[..., Tensor],
    dtype: torch.dtype,
    device: torch.device,
    states: int,
    depth: int,
    vocabulary: int,
    biased: bool,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """Losses of random states, by a kernel and written out, both in float64."""
    torch.manual_seed(0)
    hidden = torch.randn(states, depth, device=device).to(dtype)
    weight = (torch.randn(vocabulary, depth, device=device) * depth**-0.5 * 3).to(dtype)
    bias = torch.randn(vocabulary, device=device).to(dtype) if biased else None
    targets = torch.randint(vocabulary, (states,), device=device)
    targets[-1], targets[0] = 0, vocabulary - 1
    losses = cross_entropy(hidden, weight, bias, targets, *transform)

    def exact(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = hidden.double() @ weight.double().T
        logits = transform(logits if bias is None else logits + bias.double())
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    pieces = zip(hidden.split(1000), targets.split(1000), strict=True)  # float64 of a part fits
    assert losses.dtype == torch.float32
    return losses.double(), torch.cat([exact(*piece) for piece in pieces])
