"""Text as its tokens arrive is the text that the tokenizer makes of all of them."""

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from fastpeft.serving.http.detokenize import TextStream


@pytest.mark.parametrize("stops", [(), ("lo w",), ("zzz", "wor"), ("é",), ("ld\u00e9é",)])
def test_text_in_pieces_is_the_text(stops):
    """With a byte-level tokenizer, whose characters may be torn between tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=made)
    text = "hello world é 漢字 🙂 end, a torn one: "
    stream, pieces = TextStream(made, stops), []
    for token in made(text)["input_ids"] + made("é")["input_ids"][:1]:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    assert "".join(pieces) == (text[: min(ends)] if ends else text + "\ufffd")
    assert all("\ufffd" not in piece for piece in pieces[:-1])
