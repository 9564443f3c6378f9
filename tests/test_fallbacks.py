"""Recurrent layers of transformers' hybrids with this library's engine under them: the same rows,
gradients and tokens, and padding and packing as rules 4 and 13 say."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.conventions import continued

hf = pytest.importorskip("transformers")

DELTA = ("qwen3_next", "qwen3_5", "qwen4_exp", "olmo_hybrid", "kimi_linear", "bailing_hybrid")
MAMBA = ("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2")
FAMILIES = (*DELTA, "minimax", *MAMBA)
#: One for each way that rows are made; what a layer does around these all families share.
KINDS = ("qwen3_next", "kimi_linear", "minimax", "bamba", "falcon_h1")
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
GATED = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}


def make(family: str, **options: Any) -> Any:
    """A model in evaluation mode, the same numbers every time."""
    torch.manual_seed(0)
    sizes = {**SIZES, **options}
    if family == "qwen3_next":
        experts = {"num_experts": 0, "head_dim": 8, "mlp_only_layers": [0, 1]}
        model = hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**sizes, **GATED, **experts))
    elif family == "qwen3_5":
        model = hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**sizes, **GATED, head_dim=8))
    elif family == "olmo_hybrid":
        model = hf.OlmoHybridForCausalLM(
            hf.OlmoHybridConfig(**sizes, **GATED, linear_allow_neg_eigval=True)
        )
    elif family == "minimax":
        # Its masks take the length of the cache from the first layer, and its experts no float64
        sizes |= {"layer_types": SIZES["layer_types"][::-1], "experts_implementation": "eager"}
        experts = {"num_local_experts": 2, "num_experts_per_tok": 2}
        model = hf.MiniMaxForCausalLM(
            hf.MiniMaxConfig(**sizes, **experts, head_dim=8, block_size=16)
        )
    elif family in MAMBA:
        model = mamba(family, sizes)
    elif family == "qwen4_exp":
        model = qwen4(sizes)
    else:
        model = latent(family, sizes)
    return drawn(model)


def drawn(model: Any) -> Any:
    for name, x in model.named_parameters():  # gates that differ, and rows that reach the logits
        if name.endswith(("A_log", "dt_bias", ".D")):
            torch.nn.init.normal_(x, std=0.5)
        elif x.dim() > 1:
            torch.nn.init.normal_(x, std=0.1)
    return model.eval()


def qwen4(sizes: dict[str, Any], **more: Any) -> Any:
    """Recurrent and indexed layers, whose blocks of 4 keys are chosen."""
    sizes |= {"layer_types": ["linear_attention", "indexed_attention"], "eos_token_id": 1}
    del sizes["intermediate_size"]
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    experts |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    indexer = {"n_heads": 2, "kv_heads": 1, "head_dim": 8, "budget": 16, "compress_ratio": 4}
    own = {f"indexer_{name}": number for name, number in indexer.items()}
    streams = {"hc_count": 2, "hc_lowrank": 4, "head_dim": 8, "ple_layer_ids": [], **more}
    config = hf.Qwen4ExpTextConfig(**sizes, **GATED, **experts, **own, **streams)
    return hf.Qwen4ExpForCausalLM(config)


def latent(family: str, sizes: dict[str, Any]) -> Any:
    """Gates by channel beside latent attention."""
    own = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_rope_head_dim": 4}
    delta = {"linear_num_heads": 4, "linear_head_dim": 8}
    sizes |= {**own, "mlp_layer_types": ["dense"] * 2, "num_key_value_heads": 4}
    if family == "kimi_linear":
        return hf.KimiLinearForCausalLM(hf.KimiLinearConfig(**sizes, **delta, q_lora_rank=None))
    if family == "bailing_hybrid":
        return hf.BailingHybridForCausalLM(hf.BailingHybridConfig(**sizes, head_dim=8))
    sizes |= {"qk_rope_head_dim": 0, "q_lora_rank": 8, "hc_mult": 2, **delta}
    sizes["layer_types"] = ["linear_attention", "indexed_attention"]
    indexer = {"topk": 64, "head_dim": 8, "n_heads": 2, "kpool": 4}
    own = {f"index_{name}": number for name, number in indexer.items()}
    return hf.Glm5NextTextModel(
        hf.Glm5NextTextConfig(**sizes, **own, indexer_types=["full", "full"])
    )


def mamba(family: str, sizes: dict[str, Any]) -> Any:
    """A model with layers of Mamba-2: 4 heads of 16 in 2 groups, states of 8."""
    mixer = {"n_heads": 4, "d_head": 16, "n_groups": 2, "d_state": 8, "d_conv": 4}
    own = {f"mamba_{name}": number for name, number in mixer.items()}
    if family == "mamba2":
        plain = {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8}
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")
        plain |= {name: sizes[name] for name in names}
        return hf.Mamba2ForCausalLM(
            hf.Mamba2Config(**plain, bos_token_id=None, eos_token_id=None, chunk_size=16)
        )
    if family == "bamba":
        del sizes["layer_types"]
        return hf.BambaForCausalLM(hf.BambaConfig(**sizes, **own, attn_layer_indices=[1]))
    if family == "falcon_h1":
        del sizes["layer_types"], sizes["attn_implementation"]  # eager gives NaN to left padding
        multipliers = {"ssm_in_multiplier": 0.7, "ssm_multipliers": [0.5, 0.9, 1.1, 0.8, 1.2]}
        return hf.FalconH1ForCausalLM(
            hf.FalconH1Config(**sizes, **own, **multipliers, mamba_d_ssm=64, mamba_rms_norm=False)
        )
    if family == "granitemoehybrid":
        experts = {"num_local_experts": 0, "shared_intermediate_size": 48}
        return hf.GraniteMoeHybridForCausalLM(hf.GraniteMoeHybridConfig(**sizes, **own, **experts))
    if family == "nemotron_h":
        return hf.NemotronHForCausalLM(
            hf.NemotronHConfig(
                **{**sizes, "layer_types": ["linear_attention", "full_attention"]},
                mamba_num_heads=4,
                mamba_head_dim=16,
                n_groups=2,
                ssm_state_size=8,
                head_dim=8,
            )
        )
    del sizes["layer_types"]
    return hf.Zamba2ForCausalLM(
        hf.Zamba2Config(
            **sizes,
            layers_block_type=["linear_attention", "hybrid"],
            mamba_ngroups=2,
            mamba_d_state=8,
            n_mamba_heads=4,
            mamba_headdim=16,
        )
    )


def ids(batch_size: int, length: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(1, 50, (batch_size, length))


def close(found: Tensor, expected: Tensor, limit: float, what: str) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < limit, f"{what} differ by {error:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_and_gradients(family: str) -> None:
    model = make(family)
    other, whole = copy.deepcopy(model), copy.deepcopy(model)
    names = attnzoo.replace_fallbacks(other)
    kinds = [type(x) for x in model.modules()]
    assert names == [
        name
        for (name, x), kind in zip(other.named_modules(), kinds, strict=True)
        if type(x) is not kind
    ]
    assert names
    attnzoo.replace_fallbacks(whole.double())
    tokens = ids(2, 70)
    for one in (model, other, whole):
        one(tokens, labels=tokens).loss.backward()
    close(other(tokens).logits, model(tokens).logits, 1e-5, "logits")
    found, exact = dict(other.named_parameters()), dict(whole.named_parameters())
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, x in model.named_parameters():
        theirs, ours, exactly = x.grad, found[name].grad, exact[name].grad
        if ".indexer." in name:  # it chooses, which has no gradient
            assert theirs is None and ours is None
            continue
        assert theirs is not None and ours is not None and exactly is not None
        size = exactly.norm().clamp(min=1e-6)
        assert (ours - exactly).norm() / size < 1e-5, f"{name}, beside itself in float64"
        # transformers' own are off by up to 2.3e-5, where the sums of many tokens cancel
        assert (ours - theirs).norm() / size < 3e-5, name


@pytest.fixture(params=KINDS)
def replaced(request: pytest.FixtureRequest) -> Any:
    model = make(request.param).double()
    attnzoo.replace_fallbacks(model)
    return model


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


PADDED = {
    "left": [[0] * 5 + [1] * 9, [1] * 14],
    "right": [[1] * 9 + [0] * 5, [1] * 14],
    "inside": [[1] * 4 + [0] * 3 + [1] * 5 + [0] * 2, [1] * 14],
    "one row": [[0] * 2 + [1] * 4 + [0] * 3 + [1] * 5],
}


@pytest.mark.parametrize("form", PADDED)
def test_padding_is_absence(replaced: Any, form: str) -> None:
    """Rows, and what the cache hands on, equal those of the samples run alone."""
    mask = torch.tensor(PADDED[form])
    tokens, more = ids(*mask.shape).masked_fill(mask == 0, 7), ids(len(mask), 3)
    whole = torch.cat([mask, torch.ones_like(more)], 1)
    places = positions_of(whole)
    length = mask.shape[1]
    with torch.no_grad():
        first = replaced(
            tokens, attention_mask=mask, position_ids=places[:, :length], use_cache=True
        )
        then = replaced(
            more,
            attention_mask=whole,
            position_ids=places[:, length:],
            past_key_values=first.past_key_values,
        )
        for row, real in enumerate(mask.bool()):
            alone = torch.cat([tokens[row][real], more[row]])
            expected = replaced(alone[None], use_cache=False).logits[0]
            close(first.logits[row][real], expected[:-3], 1e-6, "rows of the prompt")
            close(then.logits[row], expected[-3:], 1e-6, "rows behind it")


def test_padding_within_new_tokens(replaced: Any) -> None:
    """A cached state goes on by several tokens, of which some are padding."""
    mask = torch.tensor([[1] * 6 + [0, 1, 0, 1], [1] * 10])
    tokens, places = ids(2, 10), positions_of(mask)
    with torch.no_grad():
        cache = replaced(tokens[:, :6], use_cache=True).past_key_values
        found = replaced(
            tokens[:, 6:],
            attention_mask=mask,
            position_ids=places[:, 6:],
            past_key_values=cache,
        ).logits
        for row, real in enumerate(mask.bool()):
            expected = replaced(tokens[row][real][None], use_cache=False).logits[0]
            close(found[row][real[6:]], expected[6:], 1e-6, "rows")


@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens", "seq_idx"])
def test_packed_rows_are_apart(replaced: Any, told: str) -> None:
    """Rows and gradients equal those of the pieces run alone; a piece may be shorter than the
    convolution."""
    lengths = (9, 2, 70)
    tokens = ids(1, sum(lengths))
    given: dict[str, Any] = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "use_cache": False,
    }
    if told == "cu_seq_lens":
        ends = torch.tensor([0, 9, 11, 81])
        given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    elif told == "seq_idx":
        given["seq_idx"] = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = replaced(tokens, **given).logits
    weight = next(iter(replaced.parameters()))
    (found,) = torch.autograd.grad(packed.square().sum(), weight)
    apart = [replaced(part, use_cache=False).logits for part in tokens.split(lengths, 1)]
    expected = torch.cat(apart, 1)
    close(packed, expected, 1e-6, "rows")
    close(found, torch.autograd.grad(expected.square().sum(), weight)[0], 1e-6, "gradients")


@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
def test_a_state_is_that_of_the_last_piece(family: str) -> None:
    """What a layer's cache hands on of packed rows. The last piece is shorter than the
    convolution."""
    model = make(family).double()
    (name,) = attnzoo.replace_fallbacks(model)
    layer = model.get_submodule(name)
    x = torch.randn(1, 76, 32, dtype=torch.float64)
    pieces = torch.repeat_interleave(torch.arange(2), torch.tensor([71, 2]))[None]
    with torch.no_grad():
        cache = hf.DynamicCache(config=model.config)
        layer(x[:, :73], cache_params=cache, seq_idx=pieces)
        found = layer(x[:, 73:], cache_params=cache)
        close(found, layer(x[:, 71:])[:, 2:], 1e-6, "rows")


def test_a_state_goes_on_by_any_number_of_tokens(replaced: Any) -> None:
    tokens = ids(2, 80)
    with torch.no_grad():
        expected = replaced(tokens, use_cache=False).logits
        cache, rows, lengths = None, [], (2, 1, 70, 1, 6)
        # Bamba's own positions do not go on behind a cache
        places = torch.arange(80)[None].split(lengths, 1)
        for part, place in zip(tokens.split(lengths, 1), places, strict=True):
            out = replaced(part, position_ids=place, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits)
    close(torch.cat(rows, 1), expected, 1e-6, "rows")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_are_generated(family: str) -> None:
    model = make(family)
    prompt = ids(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    beams = model.generate(prompt, num_beams=2, **options)
    attnzoo.replace_fallbacks(model)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert torch.equal(model.generate(prompt, num_beams=2, **options), beams)
    left = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    found = model.generate(prompt.masked_fill(left == 0, 0), attention_mask=left, **options)
    alone = model.generate(prompt[1:, 2:], **options)
    assert torch.equal(found[1, 6:], alone[0, 4:])


def test_restored(replaced: Any) -> None:
    """A copy, or one from a pickle, is restored like the model itself; nothing stays behind."""
    tokens = ids(1, 8)
    own = make(replaced.config.model_type.removesuffix("_text")).double()
    for model in (copy.deepcopy(replaced), pickle.loads(pickle.dumps(replaced)), replaced):
        assert attnzoo.restore_fallbacks(model) is model
        assert [type(x) for x in model.modules()] == [type(x) for x in own.modules()]
        assert not any(x._forward_pre_hooks for x in model.modules())
        assert model.state_dict().keys() == own.state_dict().keys()
        assert torch.equal(model(tokens).logits, own(tokens).logits)


def test_bfloat16_follows_the_state_in_float32() -> None:
    model = make("qwen3_next").bfloat16()
    tokens = ids(1, 70)
    expected = model(tokens, use_cache=True)
    attnzoo.replace_fallbacks(model)
    found = model(tokens, use_cache=True)
    close(found.logits.float(), expected.logits.float(), 2e-2, "logits")
    states = [out.past_key_values.get_recurrent_state(0, state_idx=0) for out in (found, expected)]
    assert states[0].dtype == states[1].dtype == torch.float32
    close(states[0], states[1], 2e-2, "states")


@pytest.mark.parametrize("family", KINDS)
def test_what_a_compiler_looks_up_is_there(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continued, "_built", {})
    model = make(family)
    attnzoo.replace_fallbacks(model)
    built = list(continued._built)
    model(ids(1, 5))
    assert list(continued._built) == built != []


@pytest.mark.thorough
def test_one_graph() -> None:
    model = make("mamba2", num_hidden_layers=1)
    attnzoo.replace_fallbacks(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(ids(2, 20), use_cache=False).logits
    found = compiled(ids(2, 20), use_cache=False).logits
    close(found, expected, 1e-6, "rows of a graph")


def test_glms_recurrent_layers() -> None:
    """Of the text model, which has no head of its own: rows, gradients and a cache."""
    model, tokens = make("glm5_next"), ids(2, 70)
    other = copy.deepcopy(model)
    assert attnzoo.replace_fallbacks(other) == ["layers.0.self_attn"]
    rows = [one(tokens).last_hidden_state for one in (model, other)]
    close(rows[1], rows[0], 1e-5, "rows")
    upstream = torch.randn_like(rows[0])
    names = [name for name, _ in model.named_parameters() if ".0.self_attn." in name]
    grads = [
        torch.autograd.grad(out, [one.get_parameter(name) for name in names], upstream)
        for one, out in zip((model, other), rows, strict=True)
    ]
    for name, theirs, ours in zip(names, *grads, strict=True):
        close(ours, theirs, 3e-5, name)
    cache, found = None, []
    with torch.no_grad():
        for part in tokens.split((5, 1, 60, 4), 1):
            out = other(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.last_hidden_state)
        close(torch.cat(found, 1), rows[0], 1e-5, "rows behind a cache")
    again = torch.arange(70).remainder(40)[None]
    with pytest.raises(attnzoo.UnsupportedError, match="indexed layers do not keep apart"):
        other(tokens[:1], position_ids=again, use_cache=False)


@pytest.mark.parametrize("family", ["qwen3_next", "bamba", "jamba"])
def test_a_swap_says_which_layers_it_leaves(family: str) -> None:
    """Replaced ones too; not where the layers are named, nor to a map."""
    if family == "jamba":
        experts = {"num_experts": 1, "num_experts_per_tok": 1, "use_mamba_kernels": False}
        sizes = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
        given = {name: x for name, x in SIZES.items() if name != "layer_types"}
        model = hf.JambaForCausalLM(hf.JambaConfig(**given, **experts, **sizes)).eval()
    else:
        model = make(family)
        attnzoo.replace_fallbacks(model)
    kinds = {"qwen3_next": "linear_attn", "bamba": "mamba", "jamba": "mamba"}
    said = rf"left its recurrent layers as they are: 1 \w+ \(model.layers.0.{kinds[family]}\)"
    with pytest.warns(UserWarning, match=said):
        attnzoo.swap(model, "sliding_window", window=4)
    (core,) = (x for x in model.modules() if isinstance(x, attnzoo.Attention))
    model(ids(1, 9))
    assert core.last_backend is not None
    attnzoo.unswap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attnzoo.swap(model, "sliding_window", layers=0, window=4)
        attnzoo.unswap(model)
        with attnzoo.attention_maps(model):
            pass


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Linear has no recurrent layer that attnzoo knows"):
        attnzoo.replace_fallbacks(torch.nn.Linear(2, 2))
    model = make("qwen3_next")
    with pytest.raises(ValueError, match="no recurrent layer of this model is replaced"):
        attnzoo.restore_fallbacks(model)
    attnzoo.replace_fallbacks(model)
    with pytest.raises(ValueError, match="replaced already; call"):
        attnzoo.replace_fallbacks(model)
    tokens, again = ids(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
    for given in ({"use_cache": True}, {"attention_mask": torch.ones(1, 6), "use_cache": False}):
        with pytest.raises(attnzoo.UnsupportedError, match="position_ids start again"):
            model(tokens, position_ids=again, **given)
    with pytest.raises(attnzoo.UnsupportedError, match="came with 2 rows"):
        model(ids(2, 6), cu_seq_lens_q=torch.tensor([0, 3, 6]), use_cache=False)
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(attnzoo.UnsupportedError, match="packed rows beside cached tokens"):
        model(tokens, past_key_values=cache, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    mamba = make("mamba2")
    attnzoo.replace_fallbacks(mamba)
    with pytest.raises(attnzoo.UnsupportedError, match="seq_idx does not reach the layers"):
        mamba(tokens, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    granite = make("granitemoehybrid")
    attnzoo.replace_fallbacks(granite)
    for given in ({"position_ids": again}, {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])}):
        with pytest.raises(attnzoo.UnsupportedError, match="softmax layers do not keep apart"):
            granite(tokens, use_cache=False, **given)
    ngrams = {"ngram_vocab_size_base": 97, "split_ngram_parts": 1, "heads_per_ngram": 1}
    ngrams |= {"make_ngram_vocab_size_divisible_by": 1, "ple_embed_dim": 16}
    with_ngrams = qwen4(dict(SIZES), **{**ngrams, "ple_layer_ids": [1]})
    attnzoo.replace_fallbacks(with_ngrams)
    with pytest.raises(attnzoo.UnsupportedError, match="n-gram embeddings do not keep apart"):
        with_ngrams(tokens, position_ids=again, use_cache=False)
