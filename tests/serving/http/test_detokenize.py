"""Text as its tokens arrive is the text that the tokenizer makes of all of them."""

import random

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from fastpeft.serving.http.detokenize import TextStream


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer whose tokens are bytes, so that characters may be torn between them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("stops", [(), ("lo w",), ("zzz", "wor"), ("é",), ("ld\u00e9é",)])
def test_text_in_pieces_is_the_text(stops, byte_level):
    text = "hello world é 漢字 🙂 end, a torn one: "
    stream, pieces = TextStream(byte_level, stops), []
    for token in byte_level(text)["input_ids"] + byte_level("é")["input_ids"][:1]:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    assert "".join(pieces) == (text[: min(ends)] if ends else text + "\ufffd")
    assert all("\ufffd" not in piece for piece in pieces[:-1])


@pytest.mark.parametrize("stops", [("cd", "b"), ("b", "cd"), ("x", "cd", "bc")])
def test_the_first_of_several_stop_strings_in_one_piece_ends_the_text(stops):
    class Words:
        def decode(self, tokens, skip_special_tokens, clean_up_tokenization_spaces):
            return "".join(("abcd", "ef")[token] for token in tokens)

    stream = TextStream(Words(), stops)
    assert stream.push(0) == "a"
    assert stream.stopped
    assert stream.finish() == ""


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [stream.push(token) for token in ids], stream.finish()


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_text(byte_level, seed):
    """Random bytes, with whole characters among them, are what they decode to, and are not held back for long."""
    choose = random.Random(seed)
    ids = []
    for _ in range(60):
        ids += byte_level(choose.choice("é漢🙂a"))["input_ids"] if choose.random() < 0.3 else [choose.randrange(256)]
    pieces, rest = streamed(byte_level, ids)
    assert "".join(pieces) + rest == byte_level.decode(ids)
    assert len(rest) <= 8


def test_a_run_of_wrong_bytes_costs_no_more_than_its_length(byte_level):
    """Each token is decoded a bounded number of times."""
    wrong = byte_level("é")["input_ids"][1:] * 400
    decoded, decode = [], byte_level.decode

    class Counting:
        def decode(self, tokens, **settings):
            decoded.append(len(tokens))
            return decode(tokens, **settings)

    pieces, rest = streamed(Counting(), wrong)
    assert "".join(pieces) + rest == "\ufffd" * 400
    assert max(decoded) <= 16
    assert sum(decoded) <= 100 * 400


def test_the_start_of_a_text_is_written_as_in_the_middle():
    """A tokenizer that drops the first token's blank, and special tokens, which are no text."""

    class Words:
        def decode(self, tokens, skip_special_tokens, clean_up_tokenization_spaces):
            assert skip_special_tokens
            assert not clean_up_tokenization_spaces
            return " ".join(f"w{token}" for token in tokens if token)

    pieces, rest = streamed(Words(), [0, 1, 2, 0, 3])
    assert pieces == ["", "w1", " w2", "", " w3"]
    assert rest == ""
