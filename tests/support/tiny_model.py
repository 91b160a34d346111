"""A tiny random Llama with a byte-level tokenizer and ChatML, for tests that need real parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the other dog jumps over the fox",
    "You are a helpful assistant. What is the capital of France? The capital is Paris.",
    "user assistant system hello there, how are you today? I am fine, thank you!",
    "Rewrite the sentence so that it is shorter. Answer in one word. 1 2 3 4 5 6 7 8 9 0",
)


def make_tokenizer(chat_template: str | None = CHATML, *, markers: bool = True) -> Any:
    """Return a small byte-level BPE tokenizer; any text round-trips through it.

    Args:
        chat_template: Its template.
        markers: Whether the vocabulary has the markers of ChatML, of which one then is the end
            token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", *(["<|im_start|>", "<|im_end|>"] if markers else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=specials[-1],
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def make_tiny_model(
    path: Path | str,
    seed: int = 0,
    *,
    chat_template: str | None = CHATML,
    markers: bool = True,
    **overrides: Any,
) -> Path:
    """Save a random 2-layer Llama (hidden 64, 4 query and 2 key/value heads) below `path`.

    Args:
        path: Directory, created where needed.
        seed: Seed of the weights; the tokenizer is always the same.
        chat_template: Template of the tokenizer; `None` makes a model that was not made to chat.
        markers: Whether the vocabulary has the markers of ChatML.
        overrides: Fields of LlamaConfig.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = Path(path)
    tokenizer = make_tokenizer(chat_template, markers=markers)
    fields: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(**(fields | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
