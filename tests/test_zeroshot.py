"""Templates, class lists, text features and top-k, against what is worked out by hand."""

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyclip.base.errors import UserError
from lazyclip.base.resources import config_names
from lazyclip.zeroshot import (
    TEMPLATE_NAMES,
    class_list,
    class_logits,
    read_classes,
    templates,
    text_features,
    topk_correct,
)
from tests.toy_models import EVA, NATIVE, make


@pytest.mark.parametrize(("name", "count"), [("openai", 80), ("simple", 7), ("plain", 1)])
def test_named_templates_have_the_known_count_and_hold_the_name(name, count):
    prompts = templates(name)
    assert len(prompts) == count
    assert all("zebra" in prompt("zebra") for prompt in prompts)
    assert len({prompt("zebra") for prompt in prompts}) == count
    assert name in TEMPLATE_NAMES


def test_the_plain_template_is_what_it_says():
    assert templates("plain")[0]("dog") == "a photo of a dog."


def test_templates_come_from_a_file_one_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a {} here.\n\n  an image of {}, 100% {{sharp\n".replace("{{", ""))
    prompts = templates(str(path))
    assert [p("cat") for p in prompts] == ["a cat here.", "an image of cat, 100% sharp"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("no slot\n", "no slot"), ("{} and {}\n", "exactly one"), ("\n\n", "no template")],
)
def test_a_wrong_template_file_names_the_line(tmp_path, text, said):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        templates(str(path))


@pytest.mark.parametrize("line", ["a {} {x", "{x} a {}", "a {} 100% }"])
def test_stray_braces_in_a_template_are_text(tmp_path, line):
    path = tmp_path / "prompts.txt"
    path.write_text(line + "\n")
    (prompt,) = templates(str(path))
    assert prompt("cat") == line.replace("{}", "cat")


def test_an_unknown_template_lists_the_names():
    with pytest.raises(UserError, match="neither a file nor one of openai, simple, plain"):
        templates("opnai")


# --- classes -------------------------------------------------------------------------------------


def test_synonyms_become_queries_of_one_class():
    classes = class_list(["cat", "person, child, man", "tv monitor"])
    assert classes.names == ("cat", "person", "tv monitor")
    assert classes.queries == ("cat", "person", "child", "man", "tv monitor")
    assert classes.query_class == (0, 1, 1, 1, 2)
    assert len(classes) == 3


def test_the_hash_knows_every_word_and_their_order():
    hashes = {
        class_list(lines).sha256
        for lines in (["a", "b"], ["b", "a"], ["a, b"], ["a"], ["a", "b, c"], ["a", "c, b"],
                      ["a, b", "c"])
    }  # fmt: skip
    assert len(hashes) == 7
    assert class_list(["a", "b"]).sha256 == class_list([" a ", "b"]).sha256


@pytest.mark.parametrize("lines", [[], ["a", ""], ["", "a"], [" , "]])
def test_empty_classes_are_refused(lines):
    with pytest.raises(UserError, match=r"empty|no name"):
        class_list(lines)


def test_classes_are_read_from_a_file_a_shipped_list_or_a_comma_list(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("cat\nsofa, couch\n", encoding="utf-8")
    assert read_classes(path) == class_list(["cat", "sofa, couch"])
    assert read_classes("cat, sofa,wall").names == ("cat", "sofa", "wall")
    assert len(read_classes("voc20")) == 20
    assert read_classes("cat").names == ("cat",)
    with pytest.raises(UserError, match=r"gone\.txt does not exist"):
        read_classes(tmp_path / "gone.txt")
    with pytest.raises(UserError, match="does not exist"):
        read_classes("some/folder/gone")


@pytest.mark.parametrize("name", config_names("classes", ".txt"))
def test_every_shipped_class_list_reads_without_a_repeated_first_name(name):
    classes = read_classes(name)
    assert len(set(classes.names)) == len(classes)
    assert set(classes.query_class) == set(range(len(classes)))


# --- text features -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NATIVE, EVA])
def test_text_features_are_unit_means_of_unit_prompts(kind):
    model = make(f"LaSt-{kind}")
    tokenizer = open_clip.get_tokenizer(NATIVE)
    prompts = [lambda c: f"a {c}", lambda c: f"the {c}", lambda c: f"{c} {c}"]
    queries = ["cat", "dog", "red bus"]
    ours = text_features(model, tokenizer, queries, prompts, batch_size=4)
    assert ours.dtype == torch.float32
    assert not ours.requires_grad
    for query, found in zip(queries, ours, strict=True):
        with torch.no_grad():
            raw = model.encode_text(tokenizer([p(query) for p in prompts])).double().numpy()
        unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
        mean = unit.mean(axis=0)
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("kind", [NATIVE, EVA])
def test_prompts_of_any_length_come_back_in_their_order_as_at_full_length(kind):
    model, tokenizer = make(kind), open_clip.get_tokenizer(NATIVE)
    queries = ["a very long name that fills all", "cat", "red bus", "x y z"]
    prompts = [lambda c: c, lambda c: f"the {c}", lambda c: f"{c} is here"]
    ours = text_features(model, tokenizer, queries, prompts, batch_size=5)
    for query, found in zip(queries, ours, strict=True):
        with torch.no_grad():
            raw = model.encode_text(tokenizer([p(query) for p in prompts])).double().numpy()
        mean = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-6)


def test_short_prompts_take_short_passes():
    model, tokenizer = make(NATIVE), open_clip.get_tokenizer(NATIVE)
    seen = []
    model.token_embedding.register_forward_hook(lambda m, a, out: seen.append(tuple(a[0].shape)))
    text_features(model, tokenizer, ["a b c d", "a", "b", "a b"], [lambda c: c], batch_size=2)
    assert seen == [(2, 3), (2, 6)]


def test_the_batch_size_changes_nothing():
    model, tokenizer = make(NATIVE), open_clip.get_tokenizer(NATIVE)
    words = [f"word {i}" for i in range(7)]
    prompts = templates("simple")
    whole = text_features(model, tokenizer, words, prompts)
    torch.testing.assert_close(text_features(model, tokenizer, words, prompts, 3), whole)


def test_a_classs_logit_is_the_largest_cosine_over_its_queries():
    draw = np.random.default_rng(0)
    features, queries = draw.standard_normal((5, 8)), draw.standard_normal((6, 8))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    owner = [0, 1, 1, 2, 0, 1]
    ours = class_logits(torch.from_numpy(features), torch.from_numpy(queries), owner, 3)
    for b in range(5):
        for c in range(3):
            wanted = max(
                features[b] @ queries[q] / np.linalg.norm(features[b])
                for q in range(6)
                if owner[q] == c
            )
            assert float(ours[b, c]) == pytest.approx(wanted, abs=1e-6)
    # The length of an image feature plays no part.
    scaled = class_logits(torch.from_numpy(7 * features), torch.from_numpy(queries), owner, 3)
    torch.testing.assert_close(scaled, ours)


@given(seed=st.integers(0, 999), n=st.integers(1, 20), classes=st.integers(1, 8))
def test_topk_counts_equal_a_count_by_hand(seed, n, classes):
    draw = np.random.default_rng(seed)
    logits = draw.permuted(np.tile(np.arange(classes, dtype=float), (n, 1)), axis=1)
    targets = draw.integers(0, classes, n)
    found = topk_correct(torch.from_numpy(logits), torch.from_numpy(targets), (1, 2, 5))
    for k in (1, 2, 5):
        if k > classes:
            assert k not in found
        else:
            rank = [(row > row[t]).sum() for row, t in zip(logits, targets, strict=True)]
            assert found[k] == sum(r < k for r in rank)


def test_fewer_classes_than_every_k_give_no_count_and_no_error():
    assert topk_correct(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), (5,)) == {}
