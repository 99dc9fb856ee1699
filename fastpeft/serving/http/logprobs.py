"""Log-probabilities in OpenAI's two forms."""

from collections.abc import Sequence
from typing import Any

from ..engine.logprobs import TokenLogprobs

_LEAST = -9999.0  # what JSON can say of minus infinity, as vLLM says it


def of_completion(
    tokenizer: Any, ids: Sequence[int], found: Sequence[TokenLogprobs | None], start: int
) -> dict[str, Any]:
    """``/v1/completions``'.

    Args:
        tokenizer: of transformers.
        ids: the tokens.
        found: of each; None for the first of a prompt, which has none.
        start: the characters of those that came before.
    """
    tokens = [_text(tokenizer, token) for token in ids]
    offsets, offset = [], start
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if each is None else _finite(each.logprob) for each in found],
        "top_logprobs": [None if each is None else _by_text(tokenizer, each) for each in found],
        "text_offset": offsets,
    }


def of_chat(tokenizer: Any, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """``/v1/chat/completions``'."""
    content = []
    for each in found:
        top = [_entry(tokenizer, token, logprob) for token, logprob in each.top]
        content.append({**_entry(tokenizer, each.token, each.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def joined(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of two pieces, in either form."""
    if before is None or after is None:
        return after if before is None else before
    return {key: before[key] if value is None else before[key] + value for key, value in after.items()}


def _by_text(tokenizer: Any, each: TokenLogprobs) -> dict[str, float]:
    """The token's own among them; of several tokens with one text, the most probable."""
    texts: dict[str, float] = {}
    for token, logprob in (*each.top, (each.token, each.logprob)):
        texts.setdefault(_text(tokenizer, token), _finite(logprob))
    return texts


def _entry(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    text = _text(tokenizer, token)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}


def _text(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
