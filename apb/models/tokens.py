"""A tokenizer as it was loaded, against the file that it was loaded from.

transformers builds some tokenizers anew from parts of tokenizer.json, by the class that another file names, and not
every release does so as the file says: 5.17 makes a SentencePiece-like one of byte-level files whose class is Llama's,
and loses spaces.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apb.models.files import read_json
from burst.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.json"  # of older composites, where transformers lets their processors alone read it
# Spaces in a row, between words and before digits, line breaks, case, accents, other scripts, symbols of more bytes.
_TEXT = "def f(x):\n    return x + 12345\n\nIt's a naïve café, OK?\t42 %  Привет, 世界! 🙂 <b>x</b>"
_FIRST_WORD = 4  # tokens; "def" has no more in any tokenizer, with a space before it or without


def as_in_file(folder: Path, loaded: Any) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose tokens are those of the folder's tokenizer.json, ``loaded`` where it has them.

    A byte-level file that was read otherwise is read again as it is. A folder without that file has nothing to compare.
    The chat template of a composite may be in a file of its own.
    Raises UserError where the tokens are others.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file, tokenizer = folder / FILE, loaded
    if file.exists():
        own = Tokenizer.from_file(str(file))
        own.no_truncation()
        own.no_padding()
        wanted, got = own.encode(_TEXT, add_special_tokens=False).ids, _tokens(loaded)
        if got != wanted and not _only_a_prefix(folder, got, wanted):
            if "ByteLevel" in str(own.pre_tokenizer):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            if _tokens(tokenizer) != wanted:
                raise UserError(
                    f"the tokenizer of {folder} is not the one in its {FILE}: it has other tokens for the same text",
                    given=f"{type(loaded).__name__} of the installed transformers",
                    allowed=f"a tokenizer class that reads {FILE} as it is",
                    remedy=f"Update transformers, or set tokenizer_class to PreTrainedTokenizerFast in {CONFIG}.",
                )
    older = folder / TEMPLATE
    if not tokenizer.chat_template and older.exists():
        tokenizer.chat_template = read_json(older).get("chat_template")
    made: PreTrainedTokenizerBase = tokenizer
    return made


def _tokens(tokenizer: Any) -> list[int]:
    return list(tokenizer.encode(_TEXT, add_special_tokens=False))


def _only_a_prefix(folder: Path, got: list[int], wanted: list[int]) -> bool:
    """Return True where the folder sets a space before texts, other than its file does, and nothing else differs."""
    file = folder / CONFIG
    if not file.exists() or read_json(file).get("add_prefix_space") is None:
        return False
    alike = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(got[::-1], wanted[::-1], strict=False))
    )
    return max(len(got), len(wanted)) - alike <= _FIRST_WORD
