"""The chunked head loss against cross-entropy spelled out target by target in float64."""

from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swlora.kernels import head_loss as module
from swlora.kernels.head_loss import CHUNK_ROWS, DEVICE_ROWS, Targets, head_loss

SIZES = [1, 5, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS, 3 * CHUNK_ROWS + 17]


class Case(NamedTuple):
    """Hidden states, a head and targets."""

    hidden: Tensor
    head: nn.Linear
    targets: Targets


def make(
    n_rows: int,
    *,
    width: int = 12,
    n_tokens: int = 97,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
) -> Case:
    """1 to 6 distinct targets a row with weights 1 to 9, over a head that is frozen."""
    generator = torch.Generator().manual_seed(n_rows)
    hidden = spread * torch.randn(n_rows, width, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(width, n_tokens, bias=bias)
    counts = torch.randint(1, 7, (n_rows,), generator=generator)
    rows = torch.repeat_interleave(torch.arange(n_rows), counts)
    ids = torch.cat([torch.randperm(n_tokens, generator=generator)[:count] for count in counts])
    weights = torch.randint(1, 10, (len(rows),), generator=generator).float()
    row_weights = torch.zeros(n_rows).index_add_(0, rows, weights)
    head = head.to(dtype).requires_grad_(False)
    return Case(hidden.to(dtype), head, Targets(rows, ids, weights, row_weights))


def spelled_out(case: Case, smoothing: float, cap: float) -> tuple[Tensor, ...]:
    """The loss and the gradients of hidden states and head, in float64, target by target."""
    parameters = [case.hidden, *case.head.parameters()]
    inputs = [x.detach().double().clone().requires_grad_() for x in parameters]
    z = nn.functional.linear(*inputs)
    if cap:
        z = cap * torch.tanh(z / cap)
    targets, loss = case.targets, torch.zeros((), dtype=torch.float64)
    for row, token, weight in zip(targets.rows, targets.ids, targets.weights.double(), strict=True):
        cross_entropy = nn.functional.cross_entropy(z[row], token, label_smoothing=smoothing)
        loss = loss + weight * cross_entropy
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def measured(case: Case, smoothing: float = 0.0, cap: float = 0.0) -> tuple[Tensor, Tensor]:
    hidden = case.hidden.clone().requires_grad_()
    loss = head_loss(hidden, case.head, case.targets, smoothing=smoothing, cap=cap)
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), gradient


def assert_equal(case: Case, smoothing: float, cap: float, bound: float) -> None:
    loss, gradient = measured(case, smoothing, cap)
    expected_loss, expected, *_ = spelled_out(case, smoothing, cap)
    assert abs(float(loss) - float(expected_loss)) <= bound * float(expected_loss)
    assert gradient.dtype == case.hidden.dtype
    error = (gradient.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) <= bound


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n_rows", SIZES)
def test_equals_cross_entropy_in_float64(n_rows: int, smoothing: float, cap: float) -> None:
    assert_equal(make(n_rows, dtype=torch.float64), smoothing, cap, 1e-12)


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_chunk_for_all_rows_as_on_a_gpu(
    smoothing: float, cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_rows_at_once", lambda *_: (DEVICE_ROWS, DEVICE_ROWS))
    assert_equal(make(3 * CHUNK_ROWS + 17, dtype=torch.float64), smoothing, cap, 1e-12)


@pytest.mark.parametrize(("n_tokens", "n_rows"), [(49_152, 4096), (262_144, 1024), (1 << 24, 128)])
def test_logits_on_a_device_are_limited_in_bytes(n_tokens: int, n_rows: int) -> None:
    on_device = torch.empty(9, 2, device="meta")
    assert module._rows_at_once(on_device, n_tokens) == (n_rows, n_rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_cross_entropy_in_float32(smoothing: float, cap: float, bias: bool) -> None:
    assert_equal(make(CHUNK_ROWS + 5, bias=bias), smoothing, cap, 2e-6)


@pytest.mark.parametrize("n_tokens", [6, 7, 1031])
def test_vocabularies_of_any_size(n_tokens: int) -> None:
    for smoothing in (0.0, 0.999):
        assert_equal(make(33, n_tokens=n_tokens, dtype=torch.float64), smoothing, 0.0, 1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bfloat16_rounds_no_worse_than_autograd(smoothing: float) -> None:
    case = make(CHUNK_ROWS + 40, width=64, n_tokens=501, dtype=torch.bfloat16)
    truth, expected, _ = spelled_out(case, smoothing, 0.0)
    hidden = case.hidden.clone().requires_grad_()
    log_p = torch.log_softmax(case.head(hidden).float(), dim=-1)
    targets = case.targets
    plain = -(1 - smoothing) * (targets.weights * log_p[targets.rows, targets.ids]).sum()
    plain = plain - smoothing * (targets.row_weights * log_p.mean(-1)).sum()
    (plain_gradient,) = torch.autograd.grad(plain, hidden)
    loss, gradient = measured(case, smoothing)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert abs(float(loss) - float(truth)) <= 1e-4 * float(truth)
    own_error = (gradient.double() - expected).norm()
    assert float(own_error) <= 1.5 * float((plain_gradient.double() - expected).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_logits_stay_finite(dtype: torch.dtype, smoothing: float) -> None:
    # The head passes the hidden state on: its entries, up to 1e4 and down to -1e4, are the logits.
    n_rows, n_tokens = 40, 16
    case = make(n_rows, width=n_tokens, n_tokens=n_tokens, spread=3000.0, dtype=dtype)
    case.hidden[:, 3], case.hidden[:, 5] = 1e4, -1e4
    case.head.weight.copy_(torch.eye(n_tokens))
    loss, gradient = measured(case, smoothing)
    expected_loss, expected, _ = spelled_out(case, smoothing, 0.0)
    assert bool(gradient.isfinite().all())
    assert abs(float(loss) - float(expected_loss)) <= 1e-6 * float(expected_loss)
    bound = 2 * torch.finfo(dtype).eps * case.targets.row_weights[:, None]
    assert bool(((gradient.double() - expected).abs() <= bound).all())


def test_a_certain_token_costs_nothing_and_an_impossible_one_its_distance() -> None:
    hidden = torch.zeros(2, 4, requires_grad=True)
    head = nn.Linear(4, 4, bias=True).requires_grad_(False)
    head.bias.copy_(torch.tensor([1e4, 0.0, -1e4, 0.0]))
    rows, ids = torch.tensor([0, 1]), torch.tensor([0, 2])
    certain = Targets(rows[:1], ids[:1], torch.ones(1), torch.ones(1))
    assert float(head_loss(hidden[:1], head, certain).detach()) == 0.0
    both = Targets(rows, ids, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0]))
    assert float(head_loss(hidden, head, both).detach()) == 6e4


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_trained_head_gets_its_gradient(smoothing: float, cap: float) -> None:
    case = make(CHUNK_ROWS + 3, bias=True, dtype=torch.float64)
    hidden = case.hidden.clone().requires_grad_()
    case.head.requires_grad_()
    loss = head_loss(hidden, case.head, case.targets, smoothing=smoothing, cap=cap)
    loss.backward()
    found = (loss.detach(), hidden.grad, case.head.weight.grad, case.head.bias.grad)
    torch.testing.assert_close(found, spelled_out(case, smoothing, cap))


def test_a_head_with_a_frozen_adapter_counts_with_it() -> None:
    case = make(CHUNK_ROWS + 3, dtype=torch.float64)
    holder = nn.ModuleDict({"head": case.head})
    config = LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
    peft_model = get_peft_model(holder, config).double().requires_grad_(False)
    wrapped = peft_model.base_model.model["head"]
    merged = nn.Linear(*case.hidden.shape[1:], case.head.out_features, bias=False).double()
    merged.weight.data = case.head.weight + wrapped.get_delta_weight("default")
    torch.testing.assert_close(
        measured(Case(case.hidden, wrapped, case.targets)),
        spelled_out(case._replace(head=merged), 0.0, 0.0)[:2],
    )


def test_a_multiple_of_the_loss_has_a_multiple_of_the_gradient() -> None:
    case = make(20, dtype=torch.float64)
    _, gradient = measured(case)
    hidden = case.hidden.clone().requires_grad_()
    (3.7 * head_loss(hidden, case.head, case.targets) + 2 * hidden.sum()).backward()
    torch.testing.assert_close(hidden.grad, 3.7 * gradient + 2)


def test_the_gradient_reaches_what_made_the_hidden_states() -> None:
    case = make(CHUNK_ROWS + 1, dtype=torch.float64)
    _, gradient = measured(case)
    half = (case.hidden / 2).requires_grad_()
    head_loss(half * 2, case.head, case.targets).backward()
    torch.testing.assert_close(half.grad, 2 * gradient)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_gradient_where_none_is_asked_for(smoothing: float) -> None:
    case = make(CHUNK_ROWS + 2)
    loss, _ = measured(case, smoothing)
    plain = head_loss(case.hidden, case.head, case.targets, smoothing=smoothing)
    assert not plain.requires_grad
    with torch.inference_mode():
        inferred = head_loss(case.hidden, case.head, case.targets, smoothing=smoothing)
    assert float(plain) == float(inferred) == float(loss)
    assert case.head.weight.grad is None


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation returned."""

    n_elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.n_elements = max(self.n_elements, tensor.numel())
        return result


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_never_holds_all_logits(smoothing: float) -> None:
    n_rows, n_tokens = 8 * CHUNK_ROWS, 211
    case = make(n_rows, n_tokens=n_tokens)
    with LargestTensor() as largest:
        measured(case, smoothing)
    assert largest.n_elements < n_rows * n_tokens / 4
