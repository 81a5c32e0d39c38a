"""How verify and diff look at weights: in tiles and slabs, by any number of workers, each byte once."""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig

import bridge
from bridge.arrays import BFLOAT16, FLOAT32
from bridge.compare import gaps
from bridge.compare.diff import diff
from bridge.compare.gaps import Product, Values, gap, gap_after_cast, tiles
from bridge.compare.sides import Held
from bridge.errors import SourceRefused
from bridge.formats.orbax.source import OrbaxSource
from bridge.proof import runtimes
from bridge.proof.runtimes import jax_forward, torch_forward
from bridge.proof.verify import Verdict, verify
from bridge.publish import record
from bridge.rules.equation import Equation
from bridge.stream.readers import Factors, Matrices
from bridge.stream.workers import Load, schedule
from tests.kit import checkpoints, golden
from tests.kit.peft import train

ALPHA = {"paligemma": 8.0, "expert": 4.5}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with LoRA, and what it is merged to."""
    home = tmp_path_factory.mktemp("pair")
    source = checkpoints.save(checkpoints.pi0_tree(frozen_dtype="bfloat16"), home / "7", quick=True)
    bridge.convert(source, home / "merged", to="torch-merged", lora_alpha=ALPHA)
    return source, home / "merged"


def said(verdict: Verdict) -> dict[str, Any]:
    return verdict.as_json()


# Workers.


def test_any_number_of_workers_finds_the_same(pair: tuple[Path, Path]) -> None:
    verdicts = [verify(*pair, lora_alpha=ALPHA, workers=workers) for workers in (1, 3)]
    assert verdicts[0].holds
    assert said(verdicts[0]) == said(verdicts[1])
    comparisons = [diff(*pair, lora_alpha=ALPHA, workers=workers) for workers in (1, 3)]
    assert comparisons[0].as_json() == comparisons[1].as_json()


def test_inputs_are_of_the_seed_and_the_weight(pair: tuple[Path, Path]) -> None:
    first, again, other = (
        {check.name: check.mean_abs for check in verify(*pair, lora_alpha=ALPHA, seed=seed).checks}
        for seed in (0, 0, 1)
    )
    assert first == again
    run = [name for name, error in first.items() if error]
    assert run and all(first[name] != other[name] for name in run)


def test_progress_ends_at_its_total(pair: tuple[Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    verify(*pair, lora_alpha=ALPHA, workers=3, progress=lambda *at: seen.append(at))
    counts = [count for count, _ in seen]
    assert counts == sorted(counts)
    assert counts[-1] == seen[-1][1]


def test_an_error_ends_every_worker(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    inner = OrbaxSource.slabs

    def broken(self: OrbaxSource, name: str, *arguments: Any) -> Any:
        if "q_einsum_1/w" in name:
            raise SourceRefused(bridge.Problem("gone", "look for it"))
        return inner(self, name, *arguments)

    monkeypatch.setattr(OrbaxSource, "slabs", broken)
    before = threading.active_count()
    with pytest.raises(SourceRefused, match="gone"):
        verify(*pair, lora_alpha=ALPHA, workers=3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bridge")]
    assert threading.active_count() <= before


def test_torch_has_its_threads_back(pair: tuple[Path, Path]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        verify(*pair, lora_alpha=ALPHA)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_checksums_come_from_what_was_compared(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No array is read a second time for the record, and a record that says otherwise is seen."""
    read = []
    inner = record._holds
    monkeypatch.setattr(
        record, "_holds", lambda source, name, recorded: read.append(name) or inner(source, name, recorded)
    )
    verdict = verify(*pair, lora_alpha=ALPHA)
    assert verdict.holds and verdict.files[str(pair[1] / "bridge.json")]
    # but for what no runtime uses, which is compared with nothing
    assert read == list(verdict.unused)


def test_twins_that_differ_are_named(tmp_path: Path) -> None:
    """A layout that stores a tied weight under both its names."""
    source = checkpoints.save(checkpoints.pi0_tree(lora={}), tmp_path / "7", quick=True)
    bridge.convert(source, tmp_path / "out", to="torch-merged", dtype="float32", layout="lerobot")
    (tmp_path / "out" / "bridge.json").unlink()
    assert verify(source, tmp_path / "out").holds
    file = tmp_path / "out" / "model.safetensors"
    state = safetensors.torch.load_file(file)
    alias = next(name for name in state if name.endswith("paligemma.lm_head.weight"))
    state[alias][3, 5] += 1
    safetensors.torch.save_file(state, file)
    verdict = verify(source, tmp_path / "out")
    assert [problem.cause for problem in verdict.problems if alias in problem.cause]


@pytest.mark.parametrize("form", ["7", "torch"])
def test_adapters_on_any_matrix(form: str, tmp_path: Path) -> None:
    """Modules for which openpi has no LoRA, and no einsum that bridge knows."""
    tree = checkpoints.pi0_tree(lora={})
    checkpoints.save(tree, tmp_path / "7", quick=True, assets=False)
    base = golden.convert(tmp_path / "7", tmp_path / "torch", dtype="float32")
    config = LoraConfig(target_modules=["q_proj", "fc1", "state_proj"], r=3, lora_alpha=7)
    train(base, config, tmp_path / "adapter")
    golden.convert(tmp_path / "adapter", tmp_path / "out", base=tmp_path / form, dtype="float32")
    for pair in (("adapter", "out"), ("out", "adapter")):
        verdict = verify(*(tmp_path / name for name in pair), base=tmp_path / form)
        assert verdict.holds, verdict.problems
        run = {check.name.rpartition(".")[0].rpartition(".")[2] for check in verdict.checks if check.max_abs}
        assert run >= {"q_proj", "fc1", "state_proj"}
    spoil(tmp_path / "out" / "model.safetensors", "state_proj.weight")
    verdict = verify(tmp_path / "adapter", tmp_path / "out", base=tmp_path / form)
    assert [problem.cause for problem in verdict.problems if "state_proj.weight" in problem.cause]


def spoil(file: Path, name: str) -> None:
    state = safetensors.torch.load_file(file)
    state[name][2, 3] += state[name].abs().max() * 1e-4
    safetensors.torch.save_file(state, file)


# Slabs: openpi's equations on fewer columns.

EQUATIONS = {
    "BTD,NDH->BTNH": {"D": 7, "N": 5, "H": 3},
    "BSD,KDH->BSKH": {"D": 7, "K": 1, "H": 3},
    "BTNH,NHD->BTD": {"D": 11, "N": 5, "H": 3},
    "BTD,DF->BTF": {"D": 7, "F": 13},
    "BTF,FD->BTD": {"D": 13, "F": 7},
}


def drawn(equation: str, sizes: dict[str, int], rank: int = 2) -> tuple[np.ndarray, Held]:
    random = np.random.default_rng(3)
    x, weight = equation.split("->")[0].split(",")
    shape = [sizes[label] for label in weight]
    a = random.standard_normal([*shape[:-1], rank], np.float32)
    b = random.standard_normal([*shape[:-2], rank, shape[-1]], np.float32)
    w = random.standard_normal(shape, np.float32)
    inputs = random.standard_normal([1, 5, *(sizes[label] for label in x[2:])], np.float32)
    return inputs, Held(w, Factors(a, b, 1.5))


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("slab", [1, 40, 1 << 20])
def test_slabs_compute_what_the_whole_leaf_does(
    equation: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By openpi's three einsums on whole arrays, in float64."""
    monkeypatch.setattr(runtimes, "SLAB", slab)
    x, held = drawn(equation, EQUATIONS[equation])
    assert held.factors is not None
    first, second = runtimes.lora_equations(equation)
    expected = np.einsum(equation, x, held.w, dtype=np.float64) + 1.5 * np.einsum(
        second, np.einsum(first, x, held.factors.a, dtype=np.float64), held.factors.b, dtype=np.float64
    )
    outputs = jax_forward(equation, x, held)
    flat = expected.reshape(1, 5, -1)
    np.testing.assert_allclose(outputs.exact, flat, atol=2e-6 * np.abs(flat).max())
    few = flat[:, : runtimes.NARROW_TOKENS]
    np.testing.assert_allclose(outputs.narrow, few, atol=0.03 * np.abs(few).max())
    assert np.abs(outputs.narrow - few).max() > 1e-4, "not in bfloat16"


@pytest.mark.parametrize("slab", [1, 40, 1 << 20])
def test_runs_of_rows_compute_what_the_whole_tensor_does(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "SLAB", slab)
    random = np.random.default_rng(4)
    tensor, a, b = (random.standard_normal(shape, np.float32) for shape in ((15, 7), (3, 7), (15, 3)))
    x = random.standard_normal((1, 5, 7), np.float32)
    equation = Equation.parse("head in dim -> (head dim) in")
    held = Held(equation.restore(tensor, {"head": 5, "dim": 3, "in": 7}), None, Matrices(a, b, 1.5))
    expected = x.astype(np.float64) @ (tensor + 1.5 * (b.astype(np.float64) @ a)).T
    outputs = torch_forward(equation, x, held)
    np.testing.assert_allclose(outputs.exact, expected, atol=2e-6 * np.abs(expected).max())
    few = expected[:, : runtimes.NARROW_TOKENS]
    np.testing.assert_allclose(outputs.narrow, few, atol=0.03 * np.abs(few).max())


# Tiles.

SHAPES = [(7,), (5, 3), (241, 479), (3, 61, 7), (2, 3, 5, 257), (61001,), (1, 997, 1), (0, 3)]


def orders(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Arrays of a shape in every order that matters: as a leaf, as a tensor, and as a part of one."""
    size = math.prod(shape)
    plain = np.arange(size, dtype=np.float32).reshape(shape)
    turned = np.ascontiguousarray(plain.T).T
    part = np.zeros([n + 1 for n in shape], np.float32)[tuple(slice(0, n) for n in shape)]
    part[...] = plain
    return [plain, turned, part]


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_cover_every_entry_once(shape: tuple[int, ...]) -> None:
    for a in orders(shape):
        for b in orders(shape):
            seen = np.zeros(shape, int)
            for tile in tiles(a, b):
                seen[tile] += 1
                assert 0 < seen[tile].size <= gaps.ENTRIES
            assert (seen == 1).all()


@pytest.mark.parametrize("shape", [(5, 3), (241, 479), (2, 3, 5, 257)])
def test_one_entry_is_found_wherever_it_is(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(5)
    for a, b in zip(orders(shape), reversed(orders(shape)), strict=True):
        for _ in range(5):
            at = tuple(int(random.integers(n)) for n in shape)
            before = b[at]
            assert gap_after_cast(a, b, FLOAT32) is None
            b[at] = before + 3
            found = gap_after_cast(a, b, FLOAT32)
            assert found is not None
            assert (found.largest, found.total, found.squares) == (3, 3, 9)
            assert found.reach == a.max()
            for odd in (np.nan, np.inf):
                b[at] = odd
                assert not gap(Values(a), Values(b)).largest <= 1e30
                b[at] = before


def test_bits_are_compared_after_the_cast() -> None:
    wide = np.array([1, 1 + 2**-12, 0.0, np.nan], np.float32)
    narrow = wide.astype(BFLOAT16)
    assert gap_after_cast(wide, narrow, BFLOAT16) is None
    assert gap_after_cast(wide, narrow.astype(np.float32), FLOAT32) is not None
    zero = gap_after_cast(np.zeros(3, np.float32), -np.zeros(3, np.float32), FLOAT32)
    assert zero is not None and zero.largest == 0


@pytest.mark.parametrize(
    "axes",
    [
        "in out -> out in",
        "head in dim -> (head dim) in",
        "head dim out -> out (head dim)",
        "out in -> out in",
        "in head dim -> (head dim) in",
    ],
)
def test_products_are_read_by_tiles(axes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaps, "EDGE", 4)
    monkeypatch.setattr(gaps, "ENTRIES", 16)
    random = np.random.default_rng(6)
    equation = Equation.parse(axes)
    sizes = dict(zip(equation.left, (5, 11, 7), strict=False))
    rows, columns = equation.weight_shape(sizes)
    a, b = (random.standard_normal(shape, np.float32) for shape in ((3, columns), (rows, 3)))
    tensor = random.standard_normal((rows, columns), np.float32)
    merged = equation.restore(tensor + np.float32(0.5) * (b @ a), sizes)
    leaf = np.ascontiguousarray(equation.restore(tensor, sizes)).astype(BFLOAT16)
    rounding = equation.restore(tensor, sizes) - leaf.astype(np.float32)
    found = gap(Values(leaf, Product(equation, sizes, Matrices(a, b, 0.5))), Values(merged))
    np.testing.assert_allclose(found.largest, np.abs(rounding).max(), rtol=1e-4)
    np.testing.assert_allclose(found.total, np.abs(rounding).sum(), rtol=1e-4)
    np.testing.assert_allclose(found.squares, np.square(rounding).sum(), rtol=1e-4)
    expected = merged - rounding
    np.testing.assert_allclose(found.norm, np.square(expected).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.reach, np.abs(expected).max(), rtol=1e-5)


def test_numbers_beyond_float32_squares() -> None:
    a, b = np.full((3, 5), 1e-30, np.float32), np.full((3, 5), 2e-30, np.float32)
    found = gap(Values(a), Values(b))
    assert math.isclose(found.squares, 15e-60, rel_tol=1e-6)
    found = gap(Values(a), Values(np.full((3, 5), 2e30, np.float32)))
    assert math.isclose(found.squares, 60e60, rel_tol=1e-6)


# The schedule.


class Watched:
    """Runs numbers on threads; keeps what ran at once."""

    def __init__(self, loads: list[Load], fails: int | None = None) -> None:
        self.loads, self.fails = loads, fails
        self.order: list[int] = []
        self.running: set[int] = set()
        self.most = 0
        self.held = 0
        self.lock = threading.Lock()

    def submit(self, threads: ThreadPoolExecutor, number: int) -> Future[int]:
        self.order.append(number)
        with self.lock:
            self.running.add(number)
            self.most = max(self.most, len(self.running))
            self.held = max(self.held, sum(self.loads[n].memory for n in self.running))
        return threads.submit(self.work, number)

    def work(self, number: int) -> int:
        if number == self.fails:
            raise RuntimeError("it fails")
        with self.lock:
            self.running.discard(number)
        return number * number


LOADS = [Load(work, memory) for work, memory in ((3, 5), (50, 40), (7, 5), (20, 70), (1, 200), (9, 30))]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_schedule_runs_the_largest_first_within_its_budget(workers: int) -> None:
    watched = Watched(LOADS)
    with ThreadPoolExecutor(workers) as threads:
        results = schedule(lambda n: watched.submit(threads, n), LOADS, workers=workers, budget=100)
    assert results == [n * n for n in range(len(LOADS))]
    assert watched.order[0] == 1
    assert watched.most <= workers
    assert watched.held <= 200, "what needs more than the budget runs alone"
    if workers == 1:
        assert watched.order == sorted(range(len(LOADS)), key=lambda n: -LOADS[n].work)


def test_schedule_starts_nothing_after_a_failure() -> None:
    watched = Watched(LOADS, fails=1)
    with ThreadPoolExecutor(1) as threads, pytest.raises(RuntimeError, match="it fails"):
        schedule(lambda n: watched.submit(threads, n), LOADS, workers=1, budget=100)
    assert watched.order == [1]
