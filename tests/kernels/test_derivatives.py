"""Derivatives that the ops do not have are refused by name: none is silently zero, on any backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import speeder_kernels as sk
from speeder_kernels import dispatch
from tests.kernels.places import all_places, at
from tests.kernels.test_edge_inputs import FLOATS, SHAPES, SIZES, arguments

DIFFERENTIABLE = [op for op in SHAPES if op != "topk_items"]


def everywhere(ops) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("op", "backend", "device"), [(op, *place) for op in ops for place in all_places(op)]
    )


def floats(op: str, backend: str) -> tuple[dict, list[str]]:
    """Arguments that the backend takes, and the names of those that carry a derivative."""
    torch.manual_seed(0)
    args = arguments(op, SIZES)
    names = [name for name in SHAPES[op] if name in FLOATS]
    if torch.float32 not in dispatch.dtypes(op, backend):
        args |= {name: args[name].bfloat16() for name in names if "bias" not in name}
    return args, names


def scalar(op: str, backend: str, device: str, args: dict, name: str) -> Callable:
    """The sum of the op's squared results, as a function of one argument."""

    def run(x):
        result = at(getattr(sk, op), backend, device)(**{**args, name: x})
        return sum(part.square().sum() for part in (result if isinstance(result, tuple) else (result,)))

    return run


@everywhere(DIFFERENTIABLE)
def test_second_derivatives(op, backend, device):
    """Of every argument. The first one is given with create_graph=True too, for a sum that does not need the second."""
    args, names = floats(op, backend)
    for name in names:
        run, x = scalar(op, backend, device, args, name), args[name]
        message = f"^{op}: second derivatives are not supported"
        leaf = x.clone().requires_grad_()
        (plain,) = torch.autograd.grad(run(leaf), leaf)
        (grad,) = torch.autograd.grad(run(leaf), leaf, create_graph=True)
        assert torch.equal(plain, grad)
        with pytest.raises(NotImplementedError, match=message):
            torch.autograd.grad(grad.square().sum() + run(leaf), leaf)
        for functional in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
            with pytest.raises(NotImplementedError, match=message):
                functional(run, x, x)
        with pytest.raises(NotImplementedError, match=message):
            torch.autograd.functional.hessian(run, x)
        with pytest.raises(NotImplementedError, match=message):  # by differentiating the gradient
            torch.autograd.functional.jvp(run, x, x)


@everywhere(SHAPES)
def test_forward_mode(op, backend, device):
    args, names = floats(op, backend)
    message = f"^{op}: forward-mode derivatives are not supported"
    for name in names:
        run, x = scalar(op, backend, device, args, name), args[name]
        for transform in (torch.func.jacfwd(run), lambda x, run=run: torch.func.jvp(run, (x,), (x,))):
            with pytest.raises(NotImplementedError, match=message):
                transform(x)
        for leaf in (x, x.clone().requires_grad_()):
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
                run(forward_ad.make_dual(leaf, x))
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(partial(within, run, x), (x,), (x,))
        with forward_ad.dual_level():  # nothing here is differentiated
            run(x)


def within(run: Callable, x: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """The op sees the tangent of the outer derivative alone."""
    return torch.func.jvp(lambda inner: run(outer) + inner.sum(), (x,), (x,))[0]


@everywhere(DIFFERENTIABLE)
def test_forward_mode_through_a_gradient(op, backend, device):
    args, names = floats(op, backend)
    leaf = args[names[0]].requires_grad_()
    results = at(getattr(sk, op), backend, device)(**args)
    out = results[0] if isinstance(results, tuple) else results
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=f"^{op}: forward-mode derivatives are not"),
    ):
        torch.autograd.grad(out, leaf, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


@pytest.mark.parametrize("op", SHAPES)
def test_forward_mode_of_a_compiled_function(op):
    args, names = floats(op, "cpu")
    run = torch.compile(scalar(op, "cpu", "cpu", args, names[0]), backend="aot_eager")
    x = args[names[0]]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"^{op}: forward-mode"):
        run(forward_ad.make_dual(x, x))


@everywhere(DIFFERENTIABLE)
@pytest.mark.parametrize("transform", ["grad", "jacrev", "hessian"])
def test_torch_func(op, backend, device, transform):
    args, names = floats(op, backend)
    for name in names:
        run, x = scalar(op, backend, device, args, name), args[name]
        with pytest.raises(
            NotImplementedError, match=f"^{op}: (torch.func's|forward-mode) derivatives are not"
        ):
            getattr(torch.func, transform)(run)(x)


@everywhere(DIFFERENTIABLE)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(op, backend, device):
    """Batches of inputs, with their gradients; batches of gradients too."""
    args, names = floats(op, backend)
    for name in names:
        run, x = scalar(op, backend, device, args, name), args[name]
        batch = torch.stack([x, 2 * x]).requires_grad_()
        results = torch.func.vmap(run)(batch)
        torch.testing.assert_close(results, torch.stack([run(batch[0]), run(batch[1])]))
        grads = [torch.autograd.grad(y.sum(), batch)[0] for y in (results, run(batch[0]) + run(batch[1]))]
        torch.testing.assert_close(*grads)
        up = torch.tensor([1.0, -2.0])
        (grads,) = torch.autograd.grad(run(x.requires_grad_()), x, up, is_grads_batched=True)
        torch.testing.assert_close(grads[1], -2 * grads[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    args, _ = floats("spae_attention", "cpu")
    q = args.pop("q").requires_grad_()
    results = [
        attend(q).square().sum()
        for attend in (
            lambda q: sk.spae_attention(q, **args),
            lambda q: checkpoint(lambda q: sk.spae_attention(q, **args), q, use_reentrant=reentrant),
        )
    ]
    grads = []
    for result in results:
        q.grad = None
        result.backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


NUMBERS = [
    ("spae_attention", "softmax_scale", "multiply q by it"),
    ("compress_items", "eps", "it is a constant"),
    ("item_cross_entropy", "scale", "multiply hidden by it"),
]


@pytest.mark.parametrize(("op", "name", "instead"), NUMBERS)
def test_a_learned_number_is_refused(op, name, instead):
    """A temperature, say, whose gradient would be lost."""
    args, _ = floats(op, "cpu")
    function = getattr(sk, op)
    number = torch.tensor(0.5, requires_grad=True)
    for learned in (number, number.exp(), number.exp()[None]):
        with pytest.raises(ValueError, match=f"^{name}: expected a number, got a tensor that .*: {instead}$"):
            function(**{**args, name: learned})
    with (
        forward_ad.dual_level(),
        pytest.raises(ValueError, match=f"^{name}: expected a number, got a tensor"),
    ):
        function(**{**args, name: forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))})
    with pytest.raises(ValueError, match=f"^{name}: expected a number, got a tensor"):
        torch.func.grad(lambda x: function(**{**args, name: x})[0].sum())(torch.tensor(0.5))


@pytest.mark.parametrize(("op", "name", "_"), NUMBERS)
def test_numbers(op, name, _):
    """A constant may come as any kind of number; what is none, or not one in float32, is refused."""
    args, _ = floats(op, "cpu")
    function = getattr(sk, op)
    results = [
        function(**{**args, name: value})
        for value in (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).numpy()[()])
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    for value, error in (
        (float("nan"), ValueError), (float("inf"), ValueError), (1e39, ValueError), (torch.ones(2), ValueError),
        (True, TypeError), ("1", TypeError), (1j, TypeError), ([0.5], TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{name}: expected "):
            function(**{**args, name: value})


@pytest.mark.parametrize(("op", "name", "_"), NUMBERS)
def test_a_number_that_vmap_maps_over(op, name, _):
    args, _ = floats(op, "cpu")
    with pytest.raises(ValueError, match=f"^{name}: expected one number for all of vmap's batch"):
        torch.func.vmap(lambda x: getattr(sk, op)(**{**args, name: x}))(torch.tensor([0.5, 1.0]))


@everywhere(["item_cross_entropy"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_log_q_that_vmap_maps_over(op, backend, device):
    """A constant too, though what vmap wraps does not say that it requires a gradient."""
    args, _ = floats(op, backend)
    args["hidden"].requires_grad_()
    run, rows = at(sk.item_cross_entropy, backend, device), -torch.rand(2, len(args["item_table"]))
    got = torch.func.vmap(lambda log_q: run(**args, log_q=log_q))(rows)
    torch.testing.assert_close(got, torch.stack([run(**args, log_q=row) for row in rows]))
    with pytest.raises(ValueError, match=r"^log_q: expected a constant, got a tensor that requires a grad"):
        torch.func.vmap(lambda log_q: run(**args, log_q=log_q))(rows.requires_grad_())


def test_the_way_to_learn_a_temperature():
    """What the errors advise gives the right gradient."""
    args, _ = floats("item_cross_entropy", "cpu")
    temperature = torch.tensor(0.7, requires_grad=True)
    grads = []
    for hidden in (args["hidden"], args["hidden"].double()):
        table = args["item_table"].to(hidden.dtype)
        if hidden.dtype == torch.float64:
            loss = torch.nn.functional.cross_entropy(hidden @ table.T * temperature.double(), args["targets"])
        else:
            loss = sk.item_cross_entropy(hidden * temperature, table, args["targets"], scale=1.0).mean()
        grads.append(torch.autograd.grad(loss, temperature)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("value", [1, 0, None, torch.tensor(True)])
def test_causal_is_a_bool(value):
    args, _ = floats("spae_attention", "cpu")
    with pytest.raises(TypeError, match=f"^causal: expected True or False, got {type(value).__name__}"):
        sk.spae_attention(**args, causal=value)


@everywhere(["topk_items"])
def test_the_best_items_are_constants(op, backend, device):
    """As after `detach()`, which `torch.func` would take for a derivative of zero."""
    args, _ = floats(op, backend)
    scores, items = at(sk.topk_items, backend, device)(
        **{**args, "hidden": args["hidden"].clone().requires_grad_()}
    )
    assert not scores.requires_grad and not items.requires_grad
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match=r"^topk_items: torch.func's derivatives"):
            transform(scalar(op, backend, device, args, "hidden"))(args["hidden"])


@everywhere(DIFFERENTIABLE)
def test_vmap_within_grad(op, backend, device):
    """What vmap wraps does not say that it requires a gradient."""
    args, names = floats(op, backend)
    run, x = scalar(op, backend, device, args, names[0]), args[names[0]]
    with pytest.raises(NotImplementedError, match=f"^{op}: torch.func's derivatives"):
        torch.func.grad(lambda batch: torch.func.vmap(run)(batch).sum())(torch.stack([x, x]))


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (3e38, ValueError),  # times log2(e) it is infinite
        (1e-60, ValueError),
        (10**400, ValueError),
        (torch.tensor(True), TypeError),
        (torch.tensor(1j), TypeError),
    ],
)
def test_numbers_that_a_kernel_cannot_take(value, error):
    args, _ = floats("item_cross_entropy", "cpu")
    with pytest.raises(error, match=r"^scale: expected"):
        sk.item_cross_entropy(**{**args, "scale": value})
