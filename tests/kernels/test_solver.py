"""The solver's three paths, each on blocks that take it, and programs of several tiles."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from adversarial import WORSE, assert_same_solution, same_bits  # noqa: E402
from torch import Tensor  # noqa: E402

from proxsparse_triton.kernels import prox  # noqa: E402
from proxsparse_triton.kernels.block import column  # noqa: E402
from proxsparse_triton.kernels.launch import Launch, interpreted  # noqa: E402
from proxsparse_triton.kernels.solver import SWEEPS_UP_TO, gain_of_a_third  # noqa: E402
from proxsparse_triton.reference import prox as reference_prox  # noqa: E402
from proxsparse_triton.reference.block import four_kept_hard, objective, solve, three_kept  # noqa: E402

N = 1024
# Blocks that take a path together: one warp of the card; under the interpreter a tile costs the same however large.
TILE = 2048 if interpreted(prox._prox_24_kernel) else 32
LAM = 0.25  # a power of two: lam |z| is the intended u to the last bit

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter


@triton.jit
def count_kernel(u_ptr, more_ptr, TILE: tl.constexpr):
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    u = tl.load(u_ptr + block[:, None] * 4 + tl.arange(0, 4)[None, :])
    tl.store(more_ptr + block, (gain_of_a_third(column(u, 0), column(u, 1), column(u, 2)) < 0).to(tl.int32))


# --- the three paths ------------------------------------------------------------------------------------------------------------


def rand(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffled(u: Tensor, seed: int = 11) -> Tensor:
    """Weights in any order and of any sign, z = u / LAM, fp32; whole tiles."""
    order, sign = rand(*u.shape, seed=seed).argsort(-1), (rand(*u.shape, seed=seed + 1) < 0.5).double() * 2 - 1
    return (u.gather(-1, order) * sign / LAM).float()[: len(u) // TILE * TILE]


def run(z: Tensor, device: str, paired: bool = False) -> Tensor:
    """The kernel on tiles of blocks z [blocks, 4]; paired: two at a time, the first one twice if their number is odd."""
    blocks = torch.cat([z, z[:TILE]])[: -(-len(z) // (2 * TILE)) * 2 * TILE] if paired else z
    out = torch.full_like(blocks, float("nan"), device=device)
    prox.prox_24(blocks.to(device), LAM, None, out, Launch(tile_blocks=TILE, num_warps=1, tiles=1 + paired))
    return out[: len(z)].cpu()


def tops(z: Tensor) -> Tensor:
    """The largest sum of u in each tile, which decides its path."""
    return (LAM * z.abs()).sum(-1).view(-1, TILE).amax(-1)


def assert_near_reference(w: Tensor, z: Tensor, worse: float = WORSE) -> Tensor:
    """Objectives within `worse` |z|^2 / 2 of the reference in fp64. Returns the reference's first 500 less the oracle's, in these units."""
    w, z = w.double(), z.double()
    best = objective(reference_prox.prox_24(z, LAM), z, LAM)
    scale = 0.5 * z.square().sum(-1)
    gap = (objective(w, z, LAM) - best) / scale
    wrong = ~(gap <= worse)  # a NaN is wrong too
    assert not wrong.any(), f"{int(wrong.sum())} of {len(z)}, first z {z[wrong][0].tolist()}: {w[wrong][0].tolist()}, {gap[wrong][0]:.1e}"
    oracle = objective(reference_prox.prox_24_exhaustive(z[:500], LAM), z[:500], LAM)
    return (best[:500] - oracle) / scale[:500]


def assert_optimal(w: Tensor, z: Tensor, worse: float = WORSE) -> None:
    """Near the reference, whose answers to the first blocks are the oracle's."""
    assert (assert_near_reference(w, z, worse).abs() <= 1e-9).all()


def assert_rounded(w: Tensor, z: Tensor, scale: Tensor | None, lam: float) -> None:
    """Objectives of w, of 16 bits, as good as those of the exact minimiser rounded, block for block: two roundings of one solution lie a
    unit apart at most, and the objective is flat at a minimum."""
    column = torch.ones(z.shape[-1]) if scale is None else scale
    blocks, solved = (column * z).double().view(-1, 4), (column * w.float()).double().view(-1, 4)
    gap = objective(solved, blocks, lam) - objective(reference_prox.prox_24(blocks, lam), blocks, lam)
    wrong = ~(gap <= 64 * torch.finfo(w.dtype).eps ** 2 * 0.5 * blocks.square().sum(-1))
    assert not wrong.any(), f"{int(wrong.sum())} of {len(blocks)}, first {blocks[wrong][0].tolist()}: {solved[wrong][0].tolist()}"


def easy_blocks(low: float, high: float, n: int = 8 * N) -> Tensor:
    """Sums of u from `low` to `high` and close to it in half of them: alike, spread, and with one or two large weights."""
    u = rand(n, 4, seed=1) ** torch.tensor([0.05, 0.5, 1.0, 4.0], dtype=torch.float64).repeat(n // 4)[:, None]
    close = torch.where(torch.arange(n) % 8 < 4, 0.02, 1.0)
    total = high - (high - low) * close * rand(n, seed=2)
    return u / u.sum(-1, keepdim=True) * total[:, None] * (1 - 1e-6)


def general_blocks(n: int = 4 * N) -> dict[str, Tensor]:
    """All numbers of kept weights, and what is hard: near ties, where the third weight appears, where the fourth does."""
    top, second = 0.2 + rand(n, seed=3), rand(n, seed=4)
    third = top * second * top * (1 + 0.05 * (rand(n, seed=5) - 0.5))
    spread = (0.02 + 1.2 * rand(n, 1, seed=6)) * (1 - rand(n, 4, seed=7) ** 2 * 0.6)
    pairs = (0.1 + 0.9 * rand(n, 1, seed=8)) * torch.cat([1 + rand(n, 1, seed=9), 1 - 0.1 * rand(n, 3, seed=10)], -1)
    normal = torch.randn(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {
        "normal": normal.abs(),
        "small": 0.4 * normal.abs(),
        "heavy-tailed": normal.abs() * normal.roll(1).exp(),
        "spread": spread,
        "three alike": pairs,
        "third at its limit": torch.stack([top, top * second, third, third * rand(n, seed=12)], -1),
    }


def two_minima(n: int = 64 * N) -> Tensor:
    """Four nearly equal weights where three and four kept are both minima, which only a comparison can tell."""
    u = (0.6 + 0.3 * rand(n, 1, seed=13)) * (1 + 10 ** (5 * rand(n, 1, seed=14) - 6) * (rand(n, 4, seed=15) - 0.5))
    u = u.float().double().sort(dim=-1, descending=True).values
    three, four = three_kept(u), four_kept_hard(u)
    a, b, c, _ = three.w.unbind(-1)
    return u[three.valid & four.valid & (u[:, 3] < a * b + b * c + c * a)]


@pytest.mark.parametrize("paired", [False, True], ids=["single", "paired"])
@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 0.012), (0.012, 0.06), (0.06, 0.22), (0.22, 0.32), (0.32, 0.42), (0.42, 0.52), (0.52, 0.62), (0.62, 0.72), (0.72, 0.8)],
)
def test_sweeps(device: str, low: float, high: float, paired: bool) -> None:
    """Each number of sweeps where it has the most to do: just below the sum from which there are more. To 2.5e-8, as `sweeps` says."""
    z = shuffled(easy_blocks(low, high))
    assert ((low < tops(z)) & (tops(z) <= high)).all()
    assert high <= SWEEPS_UP_TO.value
    assert_optimal(run(z, device, paired), z, 3e-8)


@pytest.mark.parametrize("paired", [False, True], ids=["single", "paired"])
@pytest.mark.parametrize("family", general_blocks(4))
def test_decisions(device: str, family: str, paired: bool) -> None:
    z = shuffled(general_blocks()[family])
    assert (tops(z) > SWEEPS_UP_TO.value).all()
    assert_optimal(run(z, device, paired), z)


@pytest.mark.parametrize("paired", [False, True], ids=["single", "paired"])
@pytest.mark.parametrize("top", [0.9, 1.3, 1.5, 1.7, 2.2, 3.0])
def test_steps_of_newton(device: str, top: float, paired: bool) -> None:
    """Each number of Newton steps where it has the most to do."""
    general = torch.cat(list(general_blocks(16 * N).values()))
    total = general.sum(-1)
    z = shuffled(torch.cat([easy_blocks(0.8, top), general[(total > 0.801) & (total < 0.999 * top)]]))
    assert ((tops(z) > SWEEPS_UP_TO.value) & (tops(z) <= top)).all()
    assert_optimal(run(z, device, paired), z)


# Found by climbing from the families above: Newton's method is slowest there for the steps that the sum of u allows.
SLOWEST = [
    [0.99043, 0.13172, 0.13046, 0.03857],
    [0.98041497, 0.18500082, 0.18137761, 0.00320528],
    [0.97602836, 0.20559365, 0.2006653, 0.01771129],
    [0.31863590, 0.30307590, 0.75964685, 0.31863961],
    [0.70682018, 0.70702137, 0.13424807, 0.49973704],
]


@pytest.mark.parametrize("paired", [False, True], ids=["single", "paired"])
@pytest.mark.parametrize("u", SLOWEST, ids=lambda u: f"{sum(u):.2f}")
def test_the_slowest_blocks(device: str, u: list[float], paired: bool) -> None:
    """Alone in their tiles, so that no larger sum gives them more steps."""
    z = shuffled(torch.tensor([u], dtype=torch.float64).repeat(TILE, 1))
    assert_optimal(run(z, device, paired), z)


@pytest.mark.parametrize("paired", [False, True], ids=["single", "paired"])
def test_comparisons(device: str, paired: bool) -> None:
    u = two_minima()
    kept = (solve(u) > 0).sum(-1)
    assert min((kept == 3).sum(), (kept == 4).sum()) > 500  # neither guess is always right
    u = u.repeat(-(-4 * TILE // len(u)), 1)
    z = shuffled(u[torch.randperm(len(u), generator=torch.Generator().manual_seed(0))])
    assert_optimal(run(z, device, paired), z)


def test_more_than_two_is_the_references_answer(device: str) -> None:
    """100,000 blocks, a third of them close to the limit. Left out are ties: blocks whose answer turns when u3 changes by 1e-5 of it."""
    n = 1 << 17
    top, second, third = 1.5 * rand(n, seed=1), rand(n, seed=2), rand(n, seed=3)
    limit = top * top * second * (1 + 0.2 * (third - 0.5))
    u = torch.stack([top, top * second, torch.where(torch.arange(n) % 3 == 0, limit, top * second * third), top * second * third], -1)
    u[:, 3] *= rand(n, seed=4)
    u = u.sort(dim=-1, descending=True).values.float()
    more = torch.full((n,), -1, dtype=torch.int32, device=device)
    count_kernel[(n // TILE,)](u.to(device), more, TILE=TILE)
    answers = []
    for change in (1 - 1e-5, 1, 1 + 1e-5):
        changed = u.double()
        changed[:, 2] = (changed[:, 2] * change).clamp(changed[:, 3], changed[:, 1])
        answers.append((solve(changed) > 0).sum(-1) > 2)
    clear = (answers[0] == answers[1]) & (answers[1] == answers[2])
    assert clear.float().mean() > 0.999
    assert 0.1 < answers[1].float().mean() < 0.9
    assert torch.equal(more.cpu().bool()[clear], answers[1][clear])


@pytest.mark.parametrize("paired", [False, True], ids=["single", "paired"])
@pytest.mark.parametrize("hard", [[0.3, 0.3, 0.3, 0.3], [3.0, 2.0, 1.0, 0.5], "two minima"], ids=["near", "far", "two minima"])
@pytest.mark.parametrize("high", [0.012, 0.06, 0.22, 0.52, 0.8, 1.5], ids=str)
def test_the_neighbours_path_does_not_matter(device: str, high: float, hard: list[float] | str, paired: bool) -> None:
    """The same blocks in a tile of their like and beside one hard block."""
    z = shuffled(easy_blocks(0.0, high))
    mixed = z.clone()
    mixed[::TILE] = (two_minima(N)[0] if isinstance(hard, str) else torch.tensor(hard)).float() / LAM
    alone, beside = run(z, device, paired), run(mixed, device, paired)
    others = torch.arange(len(z)) % TILE != 0
    assert (tops(mixed) > SWEEPS_UP_TO.value).all()
    assert_same_solution(beside[others], alone[others], z[others], LAM)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("kind", ["easy", "hard", "one of each"])
def test_pairs_of_bf16_blocks(device: str, kind: str, scaled: bool) -> None:
    """A thread holds two neighbouring blocks: both swept, both hard, or one of each, and each gets its own answer."""
    easy, hard = easy_blocks(0.0, 0.7)[: 2 * TILE], torch.cat(list(general_blocks().values()))[: 2 * TILE]
    u = {"easy": easy, "hard": hard, "one of each": torch.where(torch.arange(2 * TILE)[:, None] % 2 == 0, easy, hard)}[kind]
    z = shuffled(u).bfloat16().view(2, -1)
    scale = 0.5 + rand(z.shape[1], seed=1).float() if scaled else None
    w = torch.full_like(z, float("nan"), device=device)
    prox.prox_24(z.to(device), LAM, None if scale is None else scale.to(device), w, Launch(tile_blocks=TILE, num_warps=1, tiles=2))
    column = torch.ones(z.shape[1]) if scale is None else scale
    blocks, solved = (column * z.float()).view(-1, 4), (column * w.cpu().float()).view(-1, 4)
    # Two roundings of one solution to bf16 lie 2^-8 apart at most, and the objective is flat at a minimum.
    assert_optimal(solved, blocks, 2.0**-14)
    expected = reference_prox.prox_24(z.float(), LAM, column_scale=scale).bfloat16()
    assert (w.cpu() == expected).float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (0, 7), (1, 0), (1, 4 * TILE - 1)], ids=str)
def test_a_nan_in_a_pair_stays_in_its_block(device: str, place: tuple[int, int], dtype: torch.dtype) -> None:
    """The others are swept as often as without it."""
    z = shuffled(easy_blocks(0.7, 0.8)[: 2 * TILE]).to(dtype).view(2, -1)
    launch = Launch(tile_blocks=TILE, num_warps=1, tiles=2)
    alone, w = torch.zeros_like(z, device=device), torch.zeros_like(z, device=device)
    prox.prox_24(z.to(device), LAM, None, alone, launch)
    z[place] = float("nan")
    prox.prox_24(z.to(device), LAM, None, w, launch)
    nan = torch.zeros(z.shape, dtype=torch.bool)
    nan[place[0], place[1] // 4 * 4 : place[1] // 4 * 4 + 4] = True
    assert torch.equal(w.cpu().isnan(), nan)
    assert same_bits(w.cpu()[~nan], alone.cpu()[~nan])


@pytest.mark.parametrize(
    ("low", "high", "excess"),
    [
        (0, 0.012, 2e-5),
        (0.012, 0.06, 2e-5),
        (0.06, 0.22, 1e-5),
        (0.22, 0.42, 4e-5),
        (0.42, 0.62, 3e-4),
        (0.62, 0.72, 3e-4),
        (0.72, 0.8, 3e-4),
    ],
)
def test_sweeps_for_bf16(device: str, low: float, high: float, excess: float) -> None:
    """Beyond the half unit that rounding takes, results are as close as `sweeps_of_pairs` says, in units of the block's largest weight."""
    z = shuffled(easy_blocks(low, high * (1 - 1 / 250))).bfloat16()  # rounding to bf16 may add a 256th to the sum
    assert (tops(z.float()) <= high).all()
    w = torch.full_like(z, float("nan"), device=device)
    prox.prox_24(z.to(device), LAM, None, w, Launch(tile_blocks=TILE, num_warps=1, tiles=2))
    exact = reference_prox.prox_24(z.double(), LAM)
    unit = 2.0 ** (exact.abs().clamp_min(1e-38).log2().floor() - 7)
    beyond = ((w.cpu().double() - exact).abs() - 0.5 * unit) / z.double().abs().amax(-1, keepdim=True)
    assert beyond.max() <= excess


@pytest.mark.parametrize("paired", [False, True], ids=["single", "paired"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_weight_of_order_one(device: str, paired: bool, dtype: torch.dtype) -> None:
    """u1 at 1, the second and the third alike and small: the second weight is a difference of nearly equal numbers."""
    n = 32 * N
    distance = torch.where(torch.arange(n) % 4 == 0, 0.0, 10 ** (-7 + 6 * rand(n, seed=1))) * torch.where(rand(n, seed=2) < 0.5, -1, 1)
    second = 10 ** (-4 + 4 * rand(n, seed=3))
    third = second * torch.where(torch.arange(n) % 3 == 0, 1.0, 1 - 10 ** (-6 + 5 * rand(n, seed=4)))
    u = torch.stack([1 + distance, second, third, third * rand(n, seed=5)], -1)
    z = shuffled(u).to(dtype).float()
    w = run(z, device, paired)
    assert (w.abs() <= z.abs()).all()
    assert (assert_near_reference(w, z) <= 1e-9).all()  # the oracle sweeps, which stalls here


# --- tiles of a program ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("shape", [(1, 4), (1, 124), (33, 4), (3, 172), (7, 148), (1, 2052)], ids=str)
def test_programs_of_several_tiles(device: str, shape: tuple[int, int], scaled: bool, dtype: torch.dtype) -> None:
    """1, 31, 33, 129, 259 and 513 blocks: as from programs of one tile, and nothing beyond the last block is touched."""
    size = shape[0] * shape[1]
    z = torch.full((size + 4096,), float("nan"), dtype=dtype, device=device)
    easy = torch.arange(size) // 128 % 2 == 0  # every other tile, the last ones among them: one number read too many changes their path
    z[:size] = (torch.randn(size, generator=torch.Generator().manual_seed(0)) * torch.where(easy, 0.2, 1.0)).to(dtype)
    scale = 0.1 + rand(shape[1], seed=1).float() if scaled else None

    def result(z: Tensor, tiles: int) -> Tensor:
        canvas = torch.full_like(z, float("nan"))
        w = canvas[:size].view(shape)
        launch = Launch(tile_blocks=32, num_warps=1, tiles=tiles)
        prox.prox_24(z[:size].view(shape), 0.5, None if scale is None else scale.to(device), w, launch)
        assert canvas[size:].isnan().all()
        return w

    solved = result(z.float(), 1)
    values = z[:size].view(shape).float().cpu()
    assert_same_solution(solved, reference_prox.prox_24(values, 0.5, column_scale=scale), values, 0.5, scale)
    assert same_bits(result(z.float().nan_to_num(0), 1), solved)
    for tiles in (1, 3):
        assert same_bits(result(z, tiles), solved.to(dtype))
    paired = result(z, 8)  # whole programs of eight sweep pairs of tiles, with other rounding
    if dtype == torch.float32:
        assert_same_solution(paired, solved, values, 0.5, scale)
    elif size >= 8 * 32 * 4:
        assert_rounded(paired.cpu(), values, scale, 0.5)
    else:
        assert same_bits(paired, solved.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("hard", ["none", "few", "half", "all"])
def test_paired_programs(device: str, hard: str, scaled: bool, dtype: torch.dtype) -> None:
    """Two programs of four tiles; none, a few, half or all of the blocks are left for later: their own answers, in place too."""
    launch = Launch(tile_blocks=TILE, num_warps=1, tiles=4)
    size = 2 * 4 * TILE * 4
    u = torch.randn(size // 4, 4, generator=torch.Generator().manual_seed(0))
    block = torch.arange(size // 4)
    left = {"none": block < 0, "few": block % TILE == 5, "half": block * 37 % 64 < 40, "all": block >= 0}[hard]
    z = torch.where(left[:, None], 1.0, 0.1) * u
    z = z.to(dtype).view(-1, 128).to(device)
    scale = 0.5 + rand(128, seed=1).float() if scaled else None
    scale_there = None if scale is None else scale.to(device)
    canvas = torch.full((size + 4096,), float("nan"), dtype=dtype, device=device)
    w = canvas[:size].view(z.shape)
    prox.prox_24(z, 1.0, scale_there, w, launch)
    assert canvas[size:].isnan().all()
    values = z.float().cpu()
    expected = reference_prox.prox_24(values, 1.0, column_scale=scale)
    if dtype == torch.float32:
        assert_same_solution(w, expected, values, 1.0, scale)
    else:
        assert_rounded(w.cpu(), values, scale, 1.0)
    assert not w[w == 0].signbit().any()
    in_place = z.clone()
    prox.prox_24(in_place, 1.0, scale_there, in_place, launch)
    assert same_bits(in_place, w)


def test_ties_go_to_the_lowest_index_in_pairs_too(device: str) -> None:
    z = torch.tensor([[2.0, 1.5, 1.5, 1.5], [1.5, 1.5, 1.5, 2.0], [-0.0, 0.0, 0.0, 3.0], [4.0, 4.0, 4.0, 4.0]]).repeat(64, 1)
    w = torch.empty_like(z, device=device)
    prox.prox_24(z.to(device), 1.0, None, w, Launch(tile_blocks=32, num_warps=1, tiles=8))
    expected = torch.tensor([[2.0, 1.5, 0, 0], [1.5, 0, 0, 2.0], [0, 0, 0, 3.0], [4.0, 4.0, 0, 0]]).repeat(64, 1)
    assert same_bits(w.cpu(), expected)
