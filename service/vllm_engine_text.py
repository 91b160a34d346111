"""Token ids to text in the API process, without the model libraries.

The front saves the tokenizer as it has loaded and repaired it; here the `tokenizers` library alone
reads it. So the text of an answer is made by the code of our own engine, and does not depend on
what a server makes of bytes that are no characters.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.inference.engine import BaseModelRef, GenerateRequest
from core.inference.generation import Answer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from service.vllm_engine_front import FrontProcess

_MOST_TOKENIZERS = 4


class TokenTexts:
    """The texts of one base model's tokens.

    Args:
        tokenizer: Its tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_text(self, token_id: int) -> str:
        """Return one token's own text, special or not."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def open_answers(self, request: GenerateRequest, prompt: Mapping[str, Any]) -> list[Answer]:
        """Return the answers of a request, still empty.

        Args:
            request: What was asked for.
            prompt: As `core.inference.front.Front.encode` returns it.
        """
        return [
            Answer(
                index,
                prompt_ids=prompt["ids"],
                decode=self.decode,
                token_text=self.token_text,
                end_ids={*prompt["end_ids"], *request.sampling.stop_token_ids},
                sampling=request.sampling,
                max_new_tokens=prompt["max_new_tokens"],
                stream=request.stream,
            )
            for index in range(request.sampling.n)
        ]


class TextShelf:
    """Keeps the tokenizers that were used last; used in one event loop.

    Args:
        front: Saves them.
    """

    def __init__(self, front: FrontProcess) -> None:
        self._front = front
        self._loading = asyncio.Lock()
        self._kept: OrderedDict[str, TokenTexts] = OrderedDict()

    async def get(self, base: BaseModelRef) -> TokenTexts:
        """Return the texts of a base model's tokens.

        Raises:
            Conflict: Code `base_model_changed` or `base_model_unreadable`.
        """
        async with self._loading:
            if base.digest not in self._kept:
                self._kept[base.digest] = await self._load(base)
            self._kept.move_to_end(base.digest)
            while len(self._kept) > _MOST_TOKENIZERS:
                self._kept.popitem(last=False)
            return self._kept[base.digest]

    async def _load(self, base: BaseModelRef) -> TokenTexts:
        with tempfile.TemporaryDirectory(prefix="tunesmith-") as directory:
            path = Path(directory) / "tokenizer.json"
            await self._front.ask("save_tokenizer", base=base.model_dump(), path=str(path))
            return TokenTexts(await asyncio.to_thread(_read, path))


def _read(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))
