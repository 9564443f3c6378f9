"""`attnzoo maps`: the page's numbers are A's, and misuse is a sentence."""

from __future__ import annotations

import base64
import json
import math
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers as hf
from swap_models import make

import attnzoo
from attnzoo.commands.program import main
from attnzoo.report.heatmaps import LEAST
from attnzoo.report.maps.map_page import STEPS, encoded

WORDS = ("the", "cat", "that", "dog", "ran", "<b>", ".")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few words, saved with its tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    where = tmp_path_factory.mktemp("model")
    make("llama").save_pretrained(where)
    ids = {word: place for place, word in enumerate(["<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(where)
    return where


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def numbers(head: str, length: int) -> torch.Tensor:
    steps = torch.frombuffer(bytearray(base64.b64decode(head)), dtype=torch.int8).double()
    size = (math.log(LEAST) * (1 - (steps.abs() - 1) / (STEPS - 1))).exp() * steps.sign()
    return size.view(length, length)


def test_the_page_holds_a(folder: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "new" / "maps.html"
    text = "the cat that the <b> ran ."
    assert main(["maps", str(folder), text, "--layer", "1-2", "--output", str(target)]) == 0
    assert "2 layers over 7 tokens" in capsys.readouterr().out
    page = target.read_text()
    data = data_of(page)
    assert data["tokens"] == text.split() and "<b> ran" not in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    ids = hf.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    with attnzoo.attention_maps(model) as maps, torch.no_grad():
        model(ids)
    for layer, drawn in zip((1, 2), data["layers"], strict=True):
        for head, found in enumerate(drawn["heads"]):
            shown, a = numbers(found, 7), maps[layer][0, head].double()
            assert torch.equal(shown == 0, a == 0)
            near = (shown - a).abs() <= 0.04 * a + LEAST
            assert bool(near.all())


def test_what_is_negative_is_drawn_below_zero() -> None:
    steps = numbers(encoded(torch.tensor([[-0.5, 0.0], [1e-9, 1.0]])), 2)
    assert steps[0, 0] == pytest.approx(-0.5, rel=0.04) and steps[0, 1] == 0
    assert steps[1, 0] == pytest.approx(LEAST) and steps[1, 1] == 1


def test_a_swapped_attention_is_drawn(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "maps.html"
    text = tmp_path / "text.txt"
    text.write_text("the cat ran that dog")
    asked = ["--attention", "sliding_window:window=2", "--layer", "all"]
    assert main(["maps", str(folder), str(text), *asked, "--output", str(target)]) == 0
    data = data_of(target.read_text())
    assert len(data["layers"]) == 3
    assert int((numbers(data["layers"][0]["heads"][0], 5) > 0).sum()) == 9


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["SmolLM", "the cat"], "did you mean 'SmolLM2-135M'"),
        (["no/where", "the cat"], "no/where is no folder"),
        ([".", "the cat"], "cannot be read as a transformers model"),
        (["HERE", "  "], "the text is empty"),
        (["HERE", "missing.txt"], "missing.txt: No such file"),
        (["HERE", "the cat", "--output", "."], "output='.' is a folder"),
        (["HERE", "the " * 513], "the text has 513 tokens; give one of 1 to 512"),
        (["HERE", "the cat", "--layer", "7"], "it has 3 attention layers, 0 to 2"),
        (["HERE", "the cat", "--attention", "linformer:rank=4"], "linformer cannot be causal"),
    ],
)
def test_misuse_is_a_sentence(
    asked: list[str], said: str, folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(folder) if word == "HERE" else word for word in asked]
    output = [] if "--output" in given else ["--output", "maps.html"]
    assert main(["maps", *given, *output]) == 2
    assert said in capsys.readouterr().err and not Path("maps.html").exists()


def test_a_text_that_the_model_cannot_read_is_a_sentence(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 8, "intermediate_size": 8, "max_position_embeddings": 4}
    config = hf.BertConfig(**sizes)
    hf.BertModel(config).save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    asked = ["maps", str(tmp_path), "the cat that ran ."]
    assert main(asked) == 2
    assert "the text has 5 tokens; the model takes 4" in capsys.readouterr().err

    def read(self: Any, *args: Any, **kwargs: Any) -> None:
        raise IndexError("index out of range\nin self")

    asked[2] = "the cat"
    monkeypatch.setattr(hf.BertModel, "forward", read)
    monkeypatch.setattr("attnzoo.integrations.maps.attention_maps._running_ours", _nothing)
    assert main(asked) == 2
    assert "cannot read the text of 2 tokens: index out of range in self" in capsys.readouterr().err


@contextmanager
def _nothing(part: Any) -> Any:
    yield ["encoder.layer.0.attention.self"]
