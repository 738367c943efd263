"""The models of the paper: what they compute, what they remember, and that stages of a pipeline remember the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ouroboros import main
from paper.attention import RelativeAttention, relative_shift, sinusoids
from paper.data import StreamSegments
from paper.language_model import LanguageModel, Transformer, TransformerXL
from paper.presets import PRESETS
from torch import Tensor
from torch.utils.data import DataLoader

from tests.pool import WorkerPool
from tests.training import Outcome, assert_equal, fit

SIZES: dict[str, Any] = {"layers": 3, "width": 16, "heads": 2, "inner": 24, "dropout": 0.0}
MODELS = [Transformer, TransformerXL]


def tokens(batch: int, time: int) -> Tensor:
    return torch.randint(0, 256, (batch, time), generator=torch.Generator().manual_seed(3))


def enlarged(model: LanguageModel) -> Any:
    """With weights for which everything matters to the logits, in evaluation."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


# ----- what they compute


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", MODELS)
def test_tokens_to_logits_and_a_loss(make: type[LanguageModel], tied: bool) -> None:
    model = make(**SIZES, tied=tied)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    assert model(tokens(2, 7)).shape == (2, 7, 256)
    model.training_step(tokens(2, 8), 0).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (model.head.weight is model.embedding.weight) == tied
    assert len([p for p in model.parameters() if len(p) == 256 and p.dim() == 2]) == (1 if tied else 2)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("make", MODELS)
def test_no_logit_depends_on_later_tokens(make: type[LanguageModel], pre_norm: bool) -> None:
    model, text = enlarged(make(**SIZES, pre_norm=pre_norm)), tokens(2, 9)
    changed = text.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    before = model(text)
    if isinstance(model, TransformerXL):
        model.reset_memory(training=False)
    after = model(changed)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=0)
    assert ((after - before).abs().amax((0, 2))[5:] > 1e-4).all()


def test_relative_shift_gives_each_key_the_score_of_its_distance() -> None:
    for queries, keys in ((4, 4), (3, 7), (1, 5)):
        by_distance = torch.randn(2, queries, keys)
        shifted = relative_shift(by_distance)
        for i in range(queries):
            for j in range(i + keys - queries + 1):
                distance = i + keys - queries - j
                torch.testing.assert_close(shifted[:, i, j], by_distance[:, i, keys - 1 - distance], rtol=0, atol=0)


def test_relative_attention_is_equation_3() -> None:
    """One head, and each score by itself: ``(q + u) k + (q + v) W r_d``, over a memory and a segment."""
    torch.manual_seed(0)
    attention = RelativeAttention(6, heads=1, memory_length=4, dropout=0.0)
    torch.nn.init.normal_(attention.u)
    torch.nn.init.normal_(attention.v)
    text = torch.randn(1, 7, 6)
    attention(text[:, :4])
    actual = attention(text[:, 4:])

    keys, values = attention.key_value(text[0]).chunk(2, -1)
    expected = []
    for i in range(4, 7):
        q = attention.query(text[0, i])
        scores = []
        for j in range(i + 1):
            r = attention.distance(sinusoids(torch.tensor([i - j]), 6))[0]
            scores.append(((q + attention.u[0]) @ keys[j] + (q + attention.v[0]) @ r) / 6**0.5)
        expected.append(attention.proj(torch.stack(scores).softmax(0) @ values[: i + 1]))
    torch.testing.assert_close(actual[0], torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_sizes_and_settings_of_the_paper() -> None:
    with torch.device("meta"):
        counts = {make.__name__: sum(p.numel() for p in make().parameters()) for make in MODELS}
        tiny = {make: sum(p.numel() for p in make(**PRESETS["tiny"].model).parameters()) for make in MODELS}
    assert counts == {"Transformer": 37_935_360, "TransformerXL": 41_093_376}  # Dai et al.: "41M" for enwik8
    assert max(tiny.values()) < 800_000
    configured = Transformer(**SIZES).configure_optimizers()
    group = configured["optimizer"].param_groups[0]
    assert (group["initial_lr"], group["betas"], group["eps"]) == (2.5e-4, (0.9, 0.999), 1e-8)


def test_the_learning_rate_rises_and_falls() -> None:
    model = Transformer(**SIZES, warmup_steps=10, steps=100)
    factors = [model.lr_factor(step) for step in range(101)]
    assert max(factors) == factors[9]
    assert factors[0] == 0.1
    assert (factors[50], factors[100]) == pytest.approx((0.5, 0))


def test_biases_of_all_layers_may_be_one() -> None:
    assert len({id(attention.u) for attention in TransformerXL(**SIZES).attentions()}) == 3
    model = TransformerXL(**SIZES, share_biases=True)
    assert len({id(bias) for attention in model.attentions() for bias in (attention.u, attention.v)}) == 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("make", MODELS)
def test_half_of_the_precision(make: type[LanguageModel], precision: str) -> None:
    runs = [
        fit(make, segments, None, 1, module_args={**SIZES, "lr": 3e-3}, make_val_loader=segments, precision=p)
        for p in ("32-true", precision)
    ]
    half, full = ([row[key] for _, row in run.rows for key in row if "bpc" in key] for run in runs)
    assert half == pytest.approx(full, rel=0.02)


# ----- what they remember


@pytest.mark.parametrize("pre_norm", [False, True])
def test_segments_one_after_the_other_are_one_long_segment(pre_norm: bool) -> None:
    model = enlarged(TransformerXL(**SIZES, memory_length=20, pre_norm=pre_norm))
    text = tokens(2, 20)
    whole = model(text)
    model.reset_memory(training=False)
    parts = torch.cat([model(part) for part in text.split([6, 9, 5], dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    model.reset_memory(training=False)
    assert (model(text[:, 6:15]) - whole[:, 6:15]).abs().max() > 0.1  # without the memory it would not be


def test_a_memory_is_bounded_and_without_a_graph() -> None:
    attention = RelativeAttention(8, heads=2, memory_length=5, dropout=0.0)
    for time, remembered in ((3, 3), (3, 5), (8, 5), (1, 5)):
        x = torch.randn(2, time, 8, requires_grad=True)
        attention(x)
        memory = attention.memory[True]
        assert memory is not None
        assert memory.shape == (2, remembered, 8)
        assert not memory.requires_grad
    torch.testing.assert_close(memory[:, -1:], x.detach(), rtol=0, atol=0)


def test_no_memory_at_all() -> None:
    model, text = enlarged(TransformerXL(**SIZES, memory_length=0)), tokens(2, 5)
    torch.testing.assert_close(model(text), model(text), rtol=0, atol=0)


def test_other_rows_begin_without_a_memory() -> None:
    model, text = enlarged(TransformerXL(**SIZES, memory_length=8)), tokens(3, 5)
    alone = model(text)
    model.reset_memory(training=False)
    model(tokens(2, 6))
    torch.testing.assert_close(model(text), alone, rtol=0, atol=0)


def test_memories_are_not_saved() -> None:
    model = TransformerXL(**SIZES)
    names = model.state_dict().keys()
    model(tokens(2, 5))
    assert model.state_dict().keys() == names
    assert not list(model.buffers())  # which DDP would copy from one replica to the others


class Remembers(TransformerXL):
    """Logs how much the last layer remembers when a batch begins, and how many batches there were."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**SIZES, "memory_length": 8, "tied": False, "lr": 3e-3, "steps": 40, **kwargs})
        self.lengths: list[int] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        memory = self.attentions()[-1].memory[True]
        self.lengths.append(0 if memory is None else memory.shape[1])

    def on_train_end(self) -> None:
        super().on_train_end()
        assert self.lengths == [0, 6, 8, 8] * 2
        assert all(attention.memory == {True: None, False: None} for attention in self.attentions())


def segments(size: int = 46) -> DataLoader[Tensor]:
    """Two streams in segments of 6 bytes, the last of which is shorter."""
    return DataLoader(StreamSegments(bytes(range(100, 100 + size)), 2, 6), batch_size=2)


def test_an_epoch_begins_empty_and_survives_a_validation() -> None:
    """Also one after every second batch, with its own memory and another size of batches."""
    validation = lambda: DataLoader(StreamSegments(bytes(range(60)), 3, 9), batch_size=3)  # noqa: E731
    plain = fit(Remembers, segments, None, 1, max_epochs=2)
    validated = fit(Remembers, segments, None, 1, max_epochs=2, make_val_loader=validation, val_check_interval=2)
    rows = [[row["train/bpc"] for _, row in run.rows if "train/bpc" in row] for run in (plain, validated)]
    assert len(rows[0]) == 8
    assert rows[0] == rows[1]
    assert len([row for _, row in validated.rows if "val/bpc" in row]) == 4


# ----- in a pipeline


def long_text() -> DataLoader[Tensor]:
    """Sixteen batches of two rows."""
    text = bytes(torch.randint(97, 110, (2 * 6 * 16,), generator=torch.Generator().manual_seed(1)).tolist())
    return DataLoader(StreamSegments(text, 2, 6), batch_size=2)


def make_xl(**kwargs: Any) -> TransformerXL:
    return TransformerXL(**{**SIZES, "memory_length": 8, "tied": False, "lr": 3e-3, "steps": 40, **kwargs})


def run(strategy: dict[str, Any] | None, pool: WorkerPool | None = None, **model: Any) -> Outcome:
    """Two epochs with a validation in the middle of each, in this process or in those of ``pool``."""
    args = (make_xl, long_text, strategy)
    more: dict[str, Any] = {"max_epochs": 2, "make_val_loader": segments, "val_check_interval": 8, "module_args": model}
    return fit(*args, 1, **more) if pool is None else pool.run(fit, 2, *args, 2, **more)[0]


def test_one_stage_remembers_as_plain_lightning() -> None:
    assert_equal(run({"num_stages": 1}), run(None), 0.0)


def test_stages_remember_as_plain_lightning_where_nothing_is_learned(pool: WorkerPool) -> None:
    plain = run(None, lr=0.0)
    assert len(plain.rows) > 30
    assert_equal(run({"num_stages": 2, "virtual": True}, lr=0.0), plain, 1e-6)
    assert_equal(run({"num_stages": 2}, pool, lr=0.0), plain, 1e-6)


IN_A_LAYER = {"split_at": ["blocks.1.attention.proj"]}


@pytest.mark.parametrize(
    ("backward", "where", "pre_norm"), [("stash", {}, False), ("recompute", {}, False), ("stash", IN_A_LAYER, True)]
)
def test_processes_remember_as_virtual_stages(
    pool: WorkerPool, backward: str, where: dict[str, Any], pre_norm: bool
) -> None:
    virtual = run({"num_stages": 2, "virtual": True, **where}, pre_norm=pre_norm)
    ours = run({"num_stages": 2, "backward": backward, **where}, pool, pre_norm=pre_norm)
    assert_equal(ours, virtual, 1e-5)  # the root of a small second moment blows up rounding


# ----- the script


@pytest.fixture
def _elsewhere(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(bytes(tokens(1, 25_000).flatten().tolist()))


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(
    "options", ["--model transformer", "--model transformer-xl --stages 2 --virtual --untied"], ids=["plain", "virtual"]
)
def test_the_script_trains_and_tests(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([*options.split(), "--data", "text.txt", "--steps", "2", "--accelerator", "cpu"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("Bits per character of the test text: ")
    assert "text.txt, split 90/5/5 percent" in last


@pytest.mark.usefixtures("_elsewhere")
def test_the_script_says_what_is_wrong_with_a_text() -> None:
    with pytest.raises(SystemExit, match=r"error: `--data` must be a file, but there is none at 'enwik8.zip'"):
        main(["--data", "enwik8.zip"])
