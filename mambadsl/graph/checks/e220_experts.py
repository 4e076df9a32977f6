"""E220 to E224: numbers of experts, choices and groups fit together, and a bias that is to be moved is there."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divide
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E220 = declare(
    "E220",
    "`top_k` is larger than the number of experts",
    """
    A token goes to `top_k` different experts, so there must be that many.

    Why: the choice would fail, or pick an expert twice.

    Example: `moe(experts=4, top_k=8)`.

    Instead: `top_k=2`, or more experts.
    """,
)
E221 = declare(
    "E221",
    "the router's groups do not divide the experts",
    """
    A sigmoid router with `groups` chooses among groups of equally many experts: groups must divide `experts`,
    with at least 2 experts a group.

    Why: groups are compared by the sum of their best two scores.

    Example: `moe(experts=60, router=sigmoid(groups=8))`.

    Instead: `experts=64`, or a divisor of 60.
    """,
)
E222 = declare(
    "E222",
    "`top_groups` is larger than the number of groups",
    """
    A sigmoid router chooses experts of its `top_groups` best groups, so there must be that many.

    Why: the choice of groups would fail.

    Example: `router=sigmoid(groups=4, top_groups=8)`.

    Instead: `top_groups=2`, at most `groups`.
    """,
)
E223 = declare(
    "E223",
    "the chosen groups hold too few experts",
    """
    With `top_groups` of `groups` open to a token, the experts in them must be at least `top_k`.

    Why: the rest of the choices would fall on closed experts.

    Example: `moe(experts=16, top_k=6, router=sigmoid(groups=8, top_groups=2))`: only 4 experts are open.

    Instead: `top_groups=3`, or a smaller `top_k`.
    """,
)
E224 = declare(
    "E224",
    "`bias_rate` without a bias",
    """
    `bias_rate` moves the bias that a router adds to the scores for choosing: after each step up for experts
    that had fewer tokens than the mean, down for the others. Only `sigmoid` and `mlp` routers have one.

    Why: nothing would be balanced.

    Example: `moe(router=softmax, bias_rate=0.001)`.

    Instead: `router=sigmoid`, or `aux_loss=0.01`, which balances any router by a loss.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    for site in subject.sites("moe"):
        experts, top_k, router = site.f.experts, site.f.top_k, site.f.router
        if top_k > experts:
            yield site.problem(
                E220, "`top_k` must be at most `experts`", ("top_k", "experts"),
                label=f"{top_k} of {experts} experts", help=(f"`top_k={experts}` is the most",),
            )
        if site.f.bias_rate and router.name != "mlp" and not router.values.get("bias"):
            found = "`bias=false`" if router.name == "sigmoid" else f"a `{router.name}` router has none"
            yield site.problem(
                E224, "`bias_rate` needs a router with a bias", ("bias_rate", "router"), label=found,
                help=("`aux_loss=0.01` balances any router by a loss",),
            )
        groups, top_groups = router.values.get("groups", 1), router.values.get("top_groups", 1)
        if experts % groups or (groups > 1 and experts // groups < 2):
            rule = "must divide `experts`" if experts % groups else "must leave at least 2 experts a group"
            yield site.problem(
                E221, f"`groups` of the router {rule}", ("router", "experts"),
                label=f"{experts} experts in {groups} groups", help=(divide(experts, groups),),
            )
        elif top_groups > groups:
            yield site.problem(
                E222, "`top_groups` must be at most `groups`", ("router",),
                label=f"{top_groups} of {groups} groups", help=(f"`top_groups={groups}` is the most",),
            )
        elif top_k <= experts and (opened := experts // groups * top_groups) < top_k:
            least = -(-top_k * groups // experts)
            yield site.problem(
                E223, "the chosen groups must hold at least `top_k` experts", ("router", "top_k", "experts"),
                label=f"{top_groups} groups of {experts // groups} experts are {opened}, fewer than {top_k}",
                help=(f"`top_groups={least}`",),
            )
