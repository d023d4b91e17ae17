import itertools
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from classifiers.encoder import OnnxEncoder, coverage
from classifiers.export import export_encoder, find_encoder_source
from guard.errors import ArtifactError, IncompatibleArtifactError, SelfCheckError

LONG = "The lighthouse keeper counted ships all night. " * 60
ODD = [
    "",
    " ",
    "\u200b\u0000\ufffd",
    "a" * 5000,
    "日本の首都はどこですか。" * 40,
    "[SEP] [MASK] [PAD] hello",
    "tab\tnewline\n\n  spaced   out  ",
    "\ud800 lone surrogate",
    "🦄" * 300,
]


@pytest.fixture(scope="module")
def encoder(encoder_dir: Path) -> OnnxEncoder:
    return OnnxEncoder(encoder_dir, threads=2)


def test_windows_cover_every_character_of_any_text(encoder: OnnxEncoder) -> None:
    for text in [*ODD, LONG, "word " * 5000]:
        windows = encoder.windows(text)
        assert windows, text[:20]
        assert coverage([(w.start, w.end) for w in windows], len(text)) == 1.0
        assert max(len(w.ids) for w in windows) <= encoder.window
        assert encoder.encode([text])[0].coverage == 1.0


def test_windows_overlap_and_keep_the_order_of_the_tokens(encoder: OnnxEncoder) -> None:
    windows = encoder.windows(LONG)
    assert len(windows) > 5
    for left, right in itertools.pairwise(windows):
        assert left.start < right.start < left.end < right.end


def covered(encoder: OnnxEncoder, text: str) -> float:
    return coverage([(w.start, w.end) for w in encoder.segments(text)], len(text))


def test_segments_are_the_windows_and_then_each_sentence(encoder: OnnxEncoder) -> None:
    text = "Who painted the ceiling? The lighthouse keeper counted ships. Why is that so, really?"
    whole, *sentences = encoder.segments(text)
    assert [whole] == encoder.windows(text)
    assert [text[w.start : w.end].strip() for w in sentences] == [
        "Who painted the ceiling?",
        "The lighthouse keeper counted ships.",
        "Why is that so, really?",
    ]
    for window in sentences:
        alone = encoder.windows(text[window.start : window.end])[0]
        assert window.ids == alone.ids, "a sentence reads as it would alone"


@pytest.mark.parametrize(
    "border", [". ", "? ", "! ", "… ", '." ', "。", "？", "\n", "\n\n", "; ", ": "]
)
def test_sentences_end_where_writers_end_them(encoder: OnnxEncoder, border: str) -> None:
    text = f"the keeper counted every ship{border}then she climbed down the stairs"
    parts = [text[w.start : w.end] for w in encoder.segments(text)[1:]]
    assert len(parts) == 2 and "".join(parts) == text


def test_a_single_sentence_is_read_once(encoder: OnnxEncoder) -> None:
    for text in (
        "Who painted the ceiling?",
        "Who painted the ceiling?\n",
        "",
        "a.b.c",
        "3.14 is pi",
    ):
        assert encoder.segments(text) == encoder.windows(text)


def test_short_sentences_are_read_with_the_next(encoder: OnnxEncoder) -> None:
    text = "Yes. No. Who painted the ceiling of the chapel? Yes."
    sentences = [text[w.start : w.end] for w in encoder.segments(text)[1:]]
    assert not any(part.strip() in ("Yes.", "No.") for part in sentences[:-1])
    assert "".join(sentences) == text


def test_sentences_together_cover_every_character(encoder: OnnxEncoder) -> None:
    for text in (LONG, "One two three four five.  \n\n Six seven eight nine ten!?  ", "あ。" * 300):
        windows, found = encoder.windows(text), encoder.segments(text)
        assert found[: len(windows)] == windows
        sentences = found[len(windows) :]
        assert sentences[0].start == 0 and sentences[-1].end == len(text)
        for left, right in itertools.pairwise(sentences):
            assert text[left.end : right.start].strip() == ""
        tokens = [place for window in sentences for place in window.offsets]
        assert tokens == sorted(set(tokens)), "no token is read twice, none out of order"


def test_a_sentence_longer_than_a_window_is_left_to_the_windows(encoder: OnnxEncoder) -> None:
    endless = "and the keeper counted ships " * 200
    text = f"A short sentence comes first. {endless}. And a short one comes last."
    found = encoder.segments(text)
    assert max(len(w.ids) for w in found) <= encoder.window
    assert covered(encoder, text) == 1.0
    sentences = [text[w.start : w.end].strip() for w in found[len(encoder.windows(text)) :]]
    assert sentences == ["A short sentence comes first.", "And a short one comes last."]


PIECES = """
    Yes. Who is it?|the keeper counted every ship|。|?!|; |3.14 |日本の首都|🦄| \u200b|\n\n|\ud800
""".strip().split("|")


@given(st.lists(st.sampled_from([*PIECES, "a" * 60]), max_size=30).map("".join))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_segments_of_any_text_cover_it(encoder: OnnxEncoder, text: str) -> None:
    found = encoder.segments(text)
    assert covered(encoder, text) == 1.0
    assert len(set(found)) == len(found), "nothing is read twice"
    for window in found:
        assert 0 <= window.start <= window.end <= len(text)
        assert len(window.ids) == len(window.offsets) <= encoder.window
        assert all(window.start <= a <= b <= window.end for a, b in window.offsets)


def test_states_of_segments_are_those_of_their_text(encoder: OnnxEncoder) -> None:
    texts = ["Who painted the ceiling?", "The keeper counted ships. She slept until noon."]
    windows = [window for text in texts for window in encoder.segments(text)]
    states = encoder.states(windows)
    assert states.shape == (4, encoder.width)
    np.testing.assert_array_equal(states[0], encoder.encode([texts[0]])[0].features[0])
    np.testing.assert_array_equal(states[1], encoder.encode([texts[1]])[0].features[0])
    np.testing.assert_array_equal(encoder.states(windows[::-1])[::-1], states)
    assert encoder.states([]).shape == (0, encoder.width)


def test_word_ranks_know_general_english(encoder: OnnxEncoder) -> None:
    rank = encoder.word_rank
    assert rank("the") == 0
    common, rarer = rank("house"), rank("lighthouse")
    assert common is not None and rarer is not None and common < rarer
    assert rank("lighthouses") == rarer, "an inflected form counts as its stem"
    assert rank("zorvath") is None and not encoder.is_common("zorvath")
    assert encoder.is_common("house") and encoder.is_common("house")
    words = encoder.common_words()
    assert words[0] == "the" and "house" in words and all(word.isalpha() for word in words)
    assert words.index("house") < words.index("lighthouse")


def test_coverage_counts_gaps_and_overlaps() -> None:
    assert coverage([(0, 4), (6, 10)], 10) == 0.8
    assert coverage([(5, 10), (0, 7)], 10) == 1.0
    assert coverage([], 0) == 1.0
    assert coverage([], 5) == 0.0


def test_special_tokens_in_a_text_are_plain_text(encoder: OnnxEncoder) -> None:
    ids = {token for window in encoder.windows("[SEP] [MASK] [CLS]") for token in window.ids}
    assert not ids & {100, 101, 102, 103}


def test_a_very_long_word_is_read_in_pieces_not_as_unknown(encoder: OnnxEncoder) -> None:
    ids = [token for window in encoder.windows("lighthouse" * 30) for token in window.ids]
    assert 100 not in ids
    assert len(ids) >= 30


def test_features_do_not_depend_on_the_other_texts(encoder: OnnxEncoder, encoder_dir: Path) -> None:
    texts = ["A short one.", LONG, "¿Dónde está?", "def f(x): return x + 1"]
    together = encoder.encode(texts)
    alone = OnnxEncoder(encoder_dir, threads=1, cache_size=0)
    for text, features in zip(texts, together, strict=True):
        np.testing.assert_array_equal(features.features, alone.encode([text])[0].features)
    assert together[0].features.shape == (1, encoder.width)


def test_features_agree_with_transformers(encoder: OnnxEncoder) -> None:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(find_encoder_source())).eval()
    for text in ("Who painted the ceiling?", LONG[:230]):
        window = encoder.windows(text)[0]
        with torch.no_grad():
            ids = torch.tensor([[101, *window.ids, 102]])
            states = model(ids, output_hidden_states=True).hidden_states
        got = encoder.encode([text])[0].features[0].reshape(encoder.layers + 1, encoder.hidden)
        for mine, state in zip(got, states, strict=True):
            wanted = state.mean(dim=1)[0].numpy()
            cosine = mine @ wanted / np.linalg.norm(mine) / np.linalg.norm(wanted)
            assert cosine > 0.97


def test_token_states_have_their_characters(encoder: OnnxEncoder) -> None:
    states, places = encoder.tokens(LONG)
    assert states.shape == (len(places), encoder.hidden)
    assert LONG[slice(*places[1])] == "lighthouse"
    assert places == sorted(places)
    empty, nowhere = encoder.tokens("")
    assert empty.shape == (0, encoder.hidden) and nowhere == []


def test_cache_answers_equal_texts_and_stays_bounded(encoder_dir: Path) -> None:
    encoder = OnnxEncoder(encoder_dir, threads=1, cache_size=2)
    first = encoder.encode(["one", "one", "two"])
    assert first[0] is first[1]
    assert encoder.encode(["one"])[0] is first[0]
    encoder.encode(["three", "four"])
    assert len(encoder._cache._items) == 2
    assert encoder.encode(["one"])[0] is not first[0]


def test_threads_share_one_encoder(encoder: OnnxEncoder) -> None:
    texts = [f"Question number {n}: what is {n} plus {n}?" for n in range(24)]
    wanted = [row.features for row in encoder.encode(texts)]
    got: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        got[number] = encoder.encode([texts[number]])[0].features

    threads = [threading.Thread(target=work, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, features in enumerate(wanted):
        np.testing.assert_array_equal(got[number], features)


def test_export_keeps_current_files_and_is_deterministic(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    out = export_encoder(tmp_path / "a", progress=lambda *step: steps.append(step))
    inodes = {path.name: path.stat().st_ino for path in out.iterdir()}
    export_encoder(tmp_path / "a")
    assert {path.name: path.stat().st_ino for path in out.iterdir()} == inodes
    other = export_encoder(tmp_path / "b")
    for name in inodes:
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert steps[-1] == ("encoder", 3, 3)


def test_damaged_export_is_written_anew(tmp_path: Path, encoder_dir: Path) -> None:
    out = Path(shutil.copytree(encoder_dir, tmp_path / "enc"))
    (out / "tokenizer.json").write_text("{}")
    export_encoder(out)
    OnnxEncoder(out).self_check()


def test_self_check_passes_and_notices_another_model(tmp_path: Path, encoder_dir: Path) -> None:
    OnnxEncoder(encoder_dir).self_check()
    out = Path(shutil.copytree(encoder_dir, tmp_path / "enc"))
    config = json.loads((out / "encoder.json").read_text())
    config["reference"][0]["signature"] = np.ones((7, 16)).tolist()
    (out / "encoder.json").write_text(json.dumps(config))
    with pytest.raises(SelfCheckError, match="reference text 0"):
        OnnxEncoder(out).self_check()


def test_missing_or_broken_files_are_named(tmp_path: Path, encoder_dir: Path) -> None:
    with pytest.raises(ArtifactError, match=r"encoder\.json"):
        OnnxEncoder(tmp_path)
    for name in ("model.onnx", "tokenizer.json"):
        out = Path(shutil.copytree(encoder_dir, tmp_path / name))
        (out / name).write_bytes(b"not a model")
        with pytest.raises(ArtifactError, match=name):
            OnnxEncoder(out)
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(IncompatibleArtifactError, match="lacks"):
        OnnxEncoder(tmp_path)
    with pytest.raises(ArtifactError, match="not installed"):
        find_encoder_source("no_such_package_anywhere")


def test_only_bert_encoders_are_exported(tmp_path: Path) -> None:
    source = Path(shutil.copytree(find_encoder_source(), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(IncompatibleArtifactError, match="t5"):
        export_encoder(tmp_path / "out", source)
