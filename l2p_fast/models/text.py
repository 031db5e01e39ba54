"""Prompt -> text features, as the pipeline of each source model makes them.

The published L2P is conditioned on Qwen3's last hidden state but one, of the prompt set in the chat template as the
user's turn (`encode_prompts`). The features keep no padding: what pads a sequence later is learned and belongs to the
transformer. The other sources' modules put theirs together from `hidden_states`, `clip_features` and `t5_features`. No
prompt weighting and no long-prompt chunking here: the models were trained on the first tokens.

Letters: L_i tokens of prompt i, C features a token (2560 for Qwen3-4B).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

Encoders = Sequence[tuple[Any, Any]]  # text encoders with their tokenizers, in the order of the source's folder

logger = logging.getLogger(__name__)

MAX_TOKENS = 512
# Every layer's hidden state of a batch is alive at once, so a long list of prompts goes through in pieces.
_PROMPTS_AT_ONCE = 16
# transformers 5.0 collects hidden states by putting other functions in the layers' places while a call lasts, so of two
# threads that share an encoder one would get the other's.
_ENCODING = threading.Lock()


def template_prompt(tokenizer, prompt: str, thinking: bool = True) -> str:
    """``prompt`` as the user's turn of the tokenizer's chat template, the answer about to begin.

    A tokenizer without a chat template gets the prompt as it is.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return prompt
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )


def tokenize(tokenizer, prompt: str, max_tokens: int = MAX_TOKENS) -> list[int]:
    """Token ids of the templated ``prompt``: at least one, at most ``max_tokens`` (the rest is cut, with a warning)."""
    ids = list(tokenizer(template_prompt(tokenizer, prompt))["input_ids"])
    if len(ids) > max_tokens:
        _warn_of_length(len(ids), max_tokens, prompt)
        ids = ids[:max_tokens]
    if not ids:  # an empty prompt and no template: the transformer still needs a token to attend to
        filler = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
        ids = [filler or 0]
    return ids


@torch.no_grad()
def encode_prompts(
    text_encoder,
    tokenizer,
    prompts: Sequence[str],
    device: torch.device | str | None = None,
    max_tokens: int = MAX_TOKENS,
) -> list[torch.Tensor]:
    """Encode prompts, each different one once, all of them as one batch.

    The batch is padded on the right under a causal mask, so a prompt's features do not depend on its neighbours.

    Args:
        text_encoder: a transformers Qwen3 model (any causal model with `hidden_states` does).
        tokenizer: its tokenizer.
        prompts: n strings; "" is allowed.
        device: where the encoder runs; the encoder's own by default.
        max_tokens: longest sequence of token ids, template included.

    Returns:
        n tensors (L_i, C) in the encoder's dtype, on ``device``. `hidden_states[-2]`, as in Z-Image and L2P.
    """
    device = torch.device(device) if device is not None else text_encoder.device
    unique = list(dict.fromkeys(prompts))
    features: dict[str, torch.Tensor] = {}
    for start in range(0, len(unique), _PROMPTS_AT_ONCE):
        batch = unique[start : start + _PROMPTS_AT_ONCE]
        rows = [torch.tensor(tokenize(tokenizer, prompt, max_tokens)) for prompt in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        with _ENCODING:
            hidden = text_encoder(
                input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True, use_cache=False
            ).hidden_states[-2]
        for prompt, row, length in zip(batch, hidden, lengths.tolist(), strict=True):
            features[prompt] = row[:length].clone()  # a view would keep the whole batch alive
    return [features[prompt] for prompt in prompts]


# --- Of other sources ------------------------------------------------------------------------------------------------
def each_once(features: Callable[[str], torch.Tensor], prompts: Sequence[str]) -> list[torch.Tensor]:
    """``features`` of each prompt, made once for each different one, without gradients."""
    with torch.no_grad():
        made = {prompt: features(prompt) for prompt in dict.fromkeys(prompts)}
    return [made[prompt] for prompt in prompts]


def hidden_states(
    encoder, tokenizer, text: str, device: torch.device, max_tokens: int, fill: bool = False
) -> list[torch.Tensor]:
    """Every hidden state (L, C) of a causal model for ``text``, its embeddings first.

    Args:
        fill: up to ``max_tokens`` with the tokenizer's padding, which the text does not see, but which has features.
    """
    ids, mask = _tokens(tokenizer, text, max_tokens, fill)
    with _ENCODING:
        states = encoder(
            input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True, use_cache=False
        ).hidden_states
    return [state[0] for state in states]


def clip_features(encoder, tokenizer, prompt: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A CLIP's last hidden state but one (77, C), and its pooled vector, projected where the encoder has that."""
    ids, _ = _tokens(tokenizer, prompt, tokenizer.model_max_length, fill=True)
    with _ENCODING:
        out = encoder(ids.to(device), output_hidden_states=True)
    pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
    return out.hidden_states[-2][0], pooled[0]


def t5_features(encoder, tokenizer, prompt: str, device: torch.device, max_tokens: int) -> torch.Tensor:
    """T5's last hidden state (max_tokens, C), of the padding too, which nothing masks."""
    ids, _ = _tokens(tokenizer, prompt, max_tokens, fill=True)
    return encoder(ids.to(device))[0][0]


def _tokens(tokenizer, text: str, max_tokens: int, fill: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each (1, L)."""
    found = tokenizer(
        text, padding="max_length" if fill else False, max_length=max_tokens, truncation=True, return_tensors="pt"
    )
    whole = len(tokenizer(text)["input_ids"])
    if whole > max_tokens:
        _warn_of_length(whole, max_tokens, text)
    return found["input_ids"], found["attention_mask"]


def _warn_of_length(tokens: int, most: int, text: str) -> None:
    logger.warning("the prompt has %d tokens; only the first %d are used: %.40s...", tokens, most, text)
