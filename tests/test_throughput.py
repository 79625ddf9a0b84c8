"""The throughput benchmark's parts: both steps, the batch search, and what it reads and says."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch

NAMES = ("timing", "kept", "throughput_steps", "throughput_parts", "laion_shards",
         "throughput_loader", "bench_throughput")  # fmt: skip


@pytest.fixture
def bench(load):
    """Give all scripts of the benchmark by name."""
    return SimpleNamespace(**{name: load(name) for name in NAMES})


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_peers_step_written_out_is_the_peers_own_step(bench):
    pytest.importorskip("open_clip_train.train")
    steps = bench.throughput_steps
    setting = steps.Setting("ViT-nano", "token", 4)
    own = steps.Theirs(setting, "fp32", "cpu")
    written = steps.Theirs(setting, "fp32", "cpu")
    written.model.load_state_dict(copy.deepcopy(own.model.state_dict()))
    written.epoch = None
    before = weights(own.model)
    for side in (own, written):
        side.steps(2)
    after, other = weights(own.model), weights(written.model)
    assert all(torch.equal(after[name], other[name]) for name in after)
    assert not torch.equal(after["visual.proj"], before["visual.proj"])
    assert own.how != written.how


def test_the_peers_groups_are_those_of_its_main(bench):
    model = torch.nn.ModuleDict({"ln": torch.nn.LayerNorm(3), "fc": torch.nn.Linear(3, 2)})
    groups = bench.throughput_steps._plain_adamw(model).param_groups
    assert [g["weight_decay"] for g in groups] == [0.0, 0.2]
    assert [[tuple(p.shape) for p in g["params"]] for g in groups] == [[(3,), (3,), (2,)], [(2, 3)]]


@pytest.mark.parametrize("pooling", ["token", "last"])
def test_our_step_is_the_trainers_and_moves_the_weights(bench, pooling):
    steps = bench.throughput_steps
    ours = steps.Ours(steps.Setting("ViT-nano", pooling, 4, checkpointing=True), "fp32", "cpu")
    assert ours.built.info.pooling["pooling"] == pooling
    before = weights(ours.built.model)
    ours.steps(3)
    assert ours.loop.step == 3
    assert ours.loop.run_.optimizer.param_groups[0]["lr"] == pytest.approx(3e-2 * 5e-4)
    assert not torch.equal(weights(ours.built.model)["visual.proj"], before["visual.proj"])


def test_the_phases_and_kinds_of_a_step_are_shares_of_it(bench):
    steps, parts = bench.throughput_steps, bench.throughput_parts
    ours = steps.Ours(steps.Setting("ViT-nano", "last", 4), "fp32", "cpu")
    shares = parts.phases(ours, 1)
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares) == ["to the device", "image tower forward", "text tower forward", "loss",
                            "backward", "clipping and optimiser"]  # fmt: skip
    inside = parts.kernels(ours, 1)
    assert sum(inside["kinds"].values()) == pytest.approx(1)
    assert {"matrix products", "FFT"} <= set(inside["kinds"])
    assert inside["busy"] is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"), ("aten::addmm", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"), ("regular_fft_factor", "FFT"),
        ("aten::_fft_r2c", "FFT"), ("void at::native::sbtopk::gatherTopK", "choice of patches"),
        ("multi_tensor_apply_kernel<FusedAdam>", "optimiser"),
        ("vectorized_layer_norm_kernel", "norms"), ("Memcpy HtoD", "element-wise, copies"),
        ("vectorized_elementwise_kernel", "element-wise, copies"), ("nccl", "other"),
    ],
)  # fmt: skip
def test_kernels_are_told_by_their_names(bench, name, kind):
    assert bench.throughput_parts.kind_of(name) == kind


def test_a_card_that_waits_is_bound_by_the_host(bench):
    say = bench.throughput_parts.verdict
    kinds = {"matrix products": 0.7, "norms": 0.3}
    assert say({"busy": 0.5, "kinds": kinds}).startswith("the host: the card computes 50 %")
    for busy in (0.95, None):
        assert say({"busy": busy, "kinds": kinds}) == "matrix products (70 % of the computing time)"


def test_every_way_of_training_is_timed_where_none_is_named(bench):
    whole = bench.bench_throughput
    assert whole.make_parser().parse_args([]).hows.split(",") == list(whole.HOWS)
    assert "compile+checkpointing" in whole.HOWS


def test_the_search_stops_where_memory_ends_and_takes_the_fastest(bench, monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 11.0, 20.0, 24.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))

    def make(setting, precision, device):
        if setting.batch > 4:
            raise torch.OutOfMemoryError
        return SimpleNamespace(steps=lambda count: None)

    monkeypatch.setattr(bench.throughput_steps, "Ours", make)
    args = SimpleNamespace(batches="1,2,4,8,16", steps=3, precision="fp32", device="cpu")
    best, tried = bench.bench_throughput.search("ViT-nano", "last", "plain", args)
    assert best == {"batch": 2, "samples_per_s": 6.0, "memory": None}
    assert [one.get("samples_per_s") for one in tried] == [3.0, 6.0, 3.0, None]
    assert tried[-1] == {"batch": 8, "does_not_fit": True}


def test_the_comparison_halves_the_batch_until_all_sides_fit(bench, monkeypatch):
    asked = []

    def compare(model, batch, args):
        asked.append(batch)
        if batch > 100:
            raise torch.OutOfMemoryError
        return {"batch": batch}

    monkeypatch.setattr(bench.bench_throughput, "compare", compare)
    assert bench.bench_throughput.compare_where_it_fits("m", 256, None) == {"batch": 64}
    assert asked == [256, 128, 64]


def test_rates_of_windows_add_up_by_their_time(bench, tmp_path):
    lines = [
        {"step": 1, "samples": 8, "samples_per_s": 1.0, "data_wait": 0.9},
        {"step": 5, "samples": 40, "samples_per_s": 2.0, "data_wait": 0.9},
        {"step": 10, "samples": 80, "samples_per_s": 4.0, "data_wait": 0.5},  # 40 in 10 s
        {"step": 15, "samples": 120, "samples_per_s": 1.0, "data_wait": 0.0},  # 40 in 40 s
        {"step": 15, "samples": 120, "probe/top1": 0.1},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = bench.throughput_loader.read_rates(file, 5)
    assert found == pytest.approx({"samples_per_s": 80 / 50, "data_wait": 5 / 50})
    with pytest.raises(SystemExit, match="no line after step 20"):
        bench.throughput_loader.read_rates(file, 20)


def test_mfu_is_useful_work_over_the_peak(bench):
    assert bench.bench_throughput.mfu(1000.0, 123e9, 312e12) == pytest.approx(0.394, abs=1e-3)
    assert bench.bench_throughput.mfu(1.0, 1.0, None) is None


def test_work_per_sample_is_that_of_the_profile_that_open_clip_publishes(bench):
    steps = bench.throughput_steps
    ours = steps.Ours(steps.Setting("ViT-B-32", "token", 1), "fp32", "cpu")
    # Its docs/model_profile.csv: 14.78 GFLOP forward; backward costs twice that.
    assert bench.throughput_parts.flop_per_sample(ours.built) == pytest.approx(
        3 * 14.78e9, rel=0.02
    )


def test_goals_and_published_figures_stand_beside_what_was_measured(bench):
    say = bench.bench_throughput
    best = {"batch": 512, "samples_per_s": 1000.0, "memory": 2**33}
    found = {
        "hows": {"plain": {"best": best, "tried": [best]}, "compile": {"best": None, "tried": []}},
        "inside": {"flop_per_sample": 123e9, "phases": {"loss": 1.0}, "kinds": {"norms": 1.0},
                   "bound_by": "norms"},
        "fed": {"samples_per_s": 900.0, "data_wait": 0.02},
    }  # fmt: skip
    text = "\n".join(say.pooling_lines("ViT-B-16", "last", found, 312e12))
    assert "1000 samples/s at batch 512" in text
    assert "8.0 GiB, MFU 39.4 %, goal 40 %: not reached" in text
    assert "compile: no batch fits" in text
    assert "data wait 2.0 %" in text
    sides = {n: {"samples_per_s": 1.0, "ratio": r, "quartiles": [r, r]}
             for n, r in (("last", 1.02), ("open_clip", 1.0))}  # fmt: skip
    beside = {"batch": 8, "base": "open_clip", "peer": "its step", "sides": sides}
    text = "\n".join(say.beside_lines("ViT-B-16", beside, 332.0))
    assert "1.020 x open_clip (1.020-1.020), goal 1: reached" in text
    assert "332 samples/s" in text


def test_without_a_card_it_says_how_to_run_all_the_same(bench, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    monkeypatch.setattr(sys, "argv", ["bench_throughput.py"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="no CUDA device is visible; --smoke"):
        bench.bench_throughput.main()
