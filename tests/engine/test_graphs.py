"""The decoder in fixed memory: the plain decoder's tokens, by a step that a GPU could record and replay."""

import warnings
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opd_lightning.engine import cache, loops, static
from opd_lightning.engine.decoder import read
from opd_lightning.engine.recording import CudaGraphs, plainly
from opd_lightning.engine.sampling import row_uniforms
from opd_lightning.engine.static import StaticDecoder, row_sizes, step
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.errors import ConfigError
from opd_lightning.types import Generation, Sampling

from .conftest import FAMILIES, ragged
from .tape import Refused, Tapes, Watch

FAST = [name for name in FAMILIES if not name.startswith("gemma")]
GREEDY = Sampling(max_new_tokens=12, temperature=0, stop_ids=(5, 11))
SAMPLED = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.9, stop_ids=(5, 11), top_ids=4)
LONG = replace(SAMPLED, max_new_tokens=40)


@pytest.fixture
def small_blocks(monkeypatch):
    """The cache grows every five slots."""
    monkeypatch.setattr(cache, "BLOCK", 5)


def engine(graphs=True, batch_size=4) -> TransformersEngine:
    return TransformersEngine(method="loop", batch_size=batch_size, graphs=graphs)


def same(got: Generation, want: Generation) -> None:
    """The tokens to the bit; log-probs to rounding, which follows the number of slots looked at."""
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.mask, want.mask)
    assert torch.equal(got.finish, want.finish)
    assert torch.allclose(got.behavior_logp, want.behavior_logp, atol=1e-5)
    assert (got.top_ids is None) == (want.top_ids is None)
    assert want.top_ids is None or torch.equal(got.top_ids, want.top_ids)


@torch.no_grad()
def decoded(model, prompts, sampling, record, chunks=((0, 1, 2, 3), (4, 5, 6))) -> list[Generation]:
    """Chunks one after another in one memory, the second of fewer rows."""
    slots = prompts.ids.shape[1] + sampling.max_new_tokens - 1
    decoder = StaticDecoder(read(model), rows=max(map(len, chunks)), slots=slots, record=record)
    uniforms = row_uniforms(prompts.seeds, sampling.max_new_tokens)
    found = []
    for chunk in chunks:
        rows = list(chunk)
        found.append(loops.decode(decoder, prompts.ids[rows], prompts.mask[rows], uniforms[rows], sampling))
    return found


def bits(generations: list[Generation]) -> list[torch.Tensor]:
    return [t for g in generations for t in (g.ids, g.mask, g.finish, g.behavior_logp, g.top_ids)]


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_the_plain_decoders(family, sampling, make, prompts):
    model = make(family)
    for batch_size in (1, 4, 99):
        want = engine(graphs=False, batch_size=batch_size).generate(model, prompts, sampling)
        same(engine(batch_size=batch_size).generate(model, prompts, sampling), want)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 5, "top_p": 0.8}, {"temperature": 1.4, "min_p": 0.05, "vocab": 30}, {"top_p": 1.0}],
    ids=str,
)
def test_and_while_the_cache_grows(settings, qwen3, prompts):
    sampling = replace(LONG, **settings)
    want = engine(graphs=False).generate(qwen3, prompts, sampling)
    assert want.mask.sum(-1).unique().numel() > 3  # rows leave at several times
    same(engine().generate(qwen3, prompts, sampling), want)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kept", [32, 2, 1])
def test_a_replayed_recording_gives_the_same_bits(kept, qwen3, prompts, monkeypatch):
    monkeypatch.setattr(static, "_KEPT", kept)
    tapes = Tapes()
    got = decoded(qwen3, prompts, LONG, tapes)
    assert tapes.played > 2 * tapes.recorded > 10  # shapes above what is kept, each of them played again
    for mine, theirs in zip(bits(got), bits(decoded(qwen3, prompts, LONG, plainly)), strict=True):
        assert torch.equal(mine, theirs)


def test_a_shape_is_recorded_once_and_a_later_chunk_finds_it(qwen3, prompts):
    free, tapes = replace(SAMPLED, stop_ids=()), Tapes()
    decoded(qwen3, prompts, free, tapes, chunks=((0, 1, 2), (3, 4, 5), (6, 0, 1)))
    assert tapes.recorded == 1
    assert tapes.played == 3 * (free.max_new_tokens - 1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("allowed", [2, 99])
def test_no_more_shapes_are_kept_than_allowed(allowed, qwen3, prompts, monkeypatch):
    monkeypatch.setattr(static, "_KEPT", allowed)
    kept: list[int] = []
    original = StaticDecoder._shaped

    def watched(self, rows, slots):
        found = original(self, rows, slots)
        kept.append(len(self.steps))
        assert list(self.steps)[-1] == (rows, slots)  # the latest used goes last
        return found

    monkeypatch.setattr(StaticDecoder, "_shaped", watched)
    # The second chunk is no longer than the first, so nothing is dropped for a wider cache.
    decoded(qwen3, prompts, LONG, plainly, chunks=((0, 1, 2, 3), (0, 1, 2, 3)))
    assert max(kept) == 2 if allowed == 2 else 2 < max(kept) < 99


def test_what_is_nobodys_is_never_looked_at(qwen3, prompts):
    """Memory of a chunk before, full of what is not a number, changes no bit of the next: five rows run as six."""
    slots = prompts.ids.shape[1] + LONG.max_new_tokens - 1
    uniforms = row_uniforms(prompts.seeds, LONG.max_new_tokens)[:5]
    found = []
    with torch.no_grad():
        for dirty in (False, True):
            decoder = StaticDecoder(read(qwen3), rows=7, slots=slots)
            decoder._make_room(slots)
            if dirty:
                decoder.buffers.slots.store.fill_(torch.nan)
                decoder.buffers.bias.zero_()
                decoder.buffers.logits.fill_(torch.nan)
                decoder.buffers.position.fill_(slots)
            found.append(loops.decode(decoder, prompts.ids[:5], prompts.mask[:5], uniforms, LONG))
    for mine, theirs in zip(bits(found[:1]), bits(found[1:]), strict=True):
        assert torch.equal(mine, theirs)


def test_changed_weights_are_seen_at_once(make, prompts):
    model, drawn = make("qwen3"), []
    chosen = engine()
    for turn in range(3):
        drawn.append(chosen.generate(model, prompts, SAMPLED))
        same(drawn[-1], engine(graphs=False).generate(model, prompts, SAMPLED))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(turn)))
        if turn == 1:  # other addresses, and another dtype
            model.double().float()
    assert not torch.equal(drawn[0].ids, drawn[1].ids)


@pytest.mark.parametrize("lengths", [(3, 9, 1, 14), (5, 5), (4,)])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_logits_are_the_plain_decoders_in_every_precision(mode, lengths, make):
    model, prompts = make("qwen3"), ragged(lengths)
    if mode == "bfloat16":
        model.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        decoder = read(model)
        fixed = StaticDecoder(decoder, rows=5, slots=20, record=Tapes())
        (want, state), (got, mine) = (d.prefill(prompts.ids, prompts.mask, 6) for d in (decoder, fixed))
        assert torch.equal(got, want)
        for token in range(6):
            ids = torch.full((len(lengths),), token)
            (want, state), (got, mine) = decoder.step(ids, state), fixed.step(ids, mine)
            assert got.dtype == want.dtype
            bound = 1e-4 if mode == "float32" else 0.1 * float(want.float().abs().amax())
            assert torch.allclose(got.float(), want.float(), atol=bound)


def test_with_two_models(make, prompts):
    student, teacher = make("qwen3"), make("qwen2")

    def combine(s, t):
        return torch.log(0.5 * s.exp() + 0.5 * t.exp())

    want, got = (
        engine(graphs).generate_mixed(student, teacher, prompts, SAMPLED, combine) for graphs in (False, True)
    )
    same(got, want)


def test_the_step_waits_for_nothing(qwen3, prompts):
    """The loop around it does, and Watch notices: once a step, for the number of rows left."""
    with torch.no_grad():
        decoder = StaticDecoder(read(qwen3), rows=7, slots=30)
        _, state = decoder.prefill(prompts.ids, prompts.mask, 6)
        with Watch():
            _, state = decoder.step(prompts.ids[:, -1], state)
            decoder.step(prompts.ids[:, -1], state)
        order = torch.tensor([0, 6])
        with pytest.raises(Refused, match="nonzero"), Watch():
            state.keep(order)


def _elsewhere(value):
    """The same with every tensor on another device."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, tuple):
        return tuple(map(_elsewhere, value))
    if is_dataclass(value):
        return replace(value, **{f.name: _elsewhere(getattr(value, f.name)) for f in fields(value)})
    return value


@pytest.mark.parametrize("family", FAST)
def test_the_step_is_all_on_the_device(family, make):
    """On a device that holds no numbers: none is asked for, and a tensor of the host's is an error."""
    with torch.no_grad():
        fixed = StaticDecoder(read(make(family)), rows=6, slots=24)
        fixed._make_room(20)
        view = fixed.buffers.cut(4, 20)
        with FakeTensorMode():
            decoder, b = _elsewhere(fixed.decoder), _elsewhere(view)
            with Watch():
                step(decoder, b)
            for name in ("ids", "position", "cos", "sin", "bias", "logits"):
                held = getattr(b, name)
                stray = replace(b, **{name: torch.empty(held.shape, dtype=held.dtype)})
                with pytest.raises(Refused, match="between devices"), Watch():
                    step(decoder, stray)


def test_a_capture_that_fails_is_said_once_and_costs_nothing(qwen3, prompts):
    """CUDA's own recorder, on a machine without CUDA or with tensors that are elsewhere."""
    with pytest.warns(UserWarning, match=r"no CUDA graph of a decoding step .*engine\.graphs=false") as said:
        got = decoded(qwen3, prompts, SAMPLED, CudaGraphs(torch.device("cuda", 0)))
    assert len(said) == 1
    for mine, theirs in zip(bits(got), bits(decoded(qwen3, prompts, SAMPLED, plainly)), strict=True):
        assert torch.equal(mine, theirs)


def test_a_model_of_another_kind_is_warned_about(make, prompts):
    model, chosen = make("gemma3"), TransformersEngine(graphs=True)
    with pytest.warns(UserWarning, match=r"engine\.graphs has no effect on this Gemma3ForCausalLM"):
        got = chosen.generate(model, prompts, GREEDY)
    same(got, TransformersEngine().generate(model, prompts, GREEDY))


def test_off_is_the_plain_decoder(qwen3, prompts, monkeypatch):
    monkeypatch.setattr(StaticDecoder, "__init__", None)  # calling it would raise
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine(graphs=False).generate(qwen3, prompts, GREEDY).ids.shape[0] == 7
    assert TransformersEngine().graphs is False


def test_no_rows_and_one_token(qwen3, prompts):
    assert engine().generate(qwen3, prompts.rows([]), SAMPLED).ids.shape == (0, 0)
    one = replace(SAMPLED, max_new_tokens=1)
    same(engine().generate(qwen3, prompts, one), engine(graphs=False).generate(qwen3, prompts, one))


def test_settings_are_refused():
    with pytest.raises(ConfigError, match=r"`engine\.graphs` must be true or false, got 'auto'"):
        TransformersEngine(graphs="auto")
    with pytest.raises(ConfigError, match=r"`engine\.graphs` must be false with engine\.method=generate"):
        TransformersEngine(graphs=True, method="generate")


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 20, 96, 128, 129])
def test_row_sizes(most):
    sizes = row_sizes(most)
    assert sizes[0] == 1
    assert sizes[-1] == most
    assert sizes == sorted(set(sizes))
    # At most a third of the rows of a size are nobody's.
    assert all(3 * (high - low - 1) <= high for low, high in pairwise(sizes))
