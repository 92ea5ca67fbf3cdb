"""What a report may show of prompts, answers and suffixes: by default an id, a hash and a length, never words.

Every page, table and JSON file of the safety measurements asks here. Text is shown only when the user asks for it, and
then as text: control characters, which could rewrite a terminal or turn a line around, are made visible, and in HTML
everything is escaped. Model output is the last thing to trust on a page.
"""

from __future__ import annotations

import hashlib
import html
import unicodedata
from dataclasses import dataclass, field

from secateur.errors import InvalidParameter, check_whole
from secateur.safety.records import Answer, Prompt

LIMIT = 2_000  # characters shown of one text


@dataclass(frozen=True)
class Shown:
    """What is left of a text. sha256: of the text (of a prompt: `Prompt.sha256`). text: None unless asked for."""

    kind: str
    id: str
    sha256: str
    characters: int
    text: str | None = field(default=None, repr=False)

    @property
    def html(self) -> str:
        """For a page: escaped, in <pre> if there is text, and <code> for what stands in its place."""
        if self.text is None:
            return f"<code>{html.escape(str(self))}</code>"
        return f"<pre>{html.escape(self.text)}</pre>"

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON; without the key `text` unless it was asked for."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        return self.text or f"[{self.kind} {visible(self.id)}, sha256 {self.sha256[:8]}, {self.characters} characters]"


@dataclass(frozen=True)
class Redaction:
    """The decision, made once a report. show_text: whether the user asked for words; limit: characters of each.

    >>> prompt = Prompt("7", "mine", "How are <b>you</b>?", "benign")
    >>> print(Redaction().prompt(prompt))
    [prompt 7, sha256 125a6bb2, 19 characters]
    >>> Redaction(show_text=True).prompt(prompt).html
    '<pre>How are &lt;b&gt;you&lt;/b&gt;?</pre>'
    """

    show_text: bool = False
    limit: int = LIMIT

    def __post_init__(self) -> None:
        if not isinstance(self.show_text, bool):  # a mistaken "no" must not open everything
            raise InvalidParameter("show_text", "Redaction", "True or False", self.show_text)
        check_whole("limit", "Redaction", self.limit)

    def prompt(self, prompt: Prompt) -> Shown:
        """Of a prompt: its conversation."""
        turns = prompt.turns
        text = prompt.text if prompt.messages is None else "\n".join(f"{role}: {content}" for role, content in turns)
        return self._show("prompt", prompt.id, prompt.sha256, text)

    def answer(self, answer: Answer) -> Shown:
        """Of an answer; the id is its prompt's."""
        return self.text("answer", answer.prompt, answer.text)

    def text(self, kind: str, id: str, text: str) -> Shown:
        """Of anything else, as a suffix of an attack or what a judge wrote."""
        return self._show(kind, id, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), text)

    def _show(self, kind: str, id: str, sha256: str, text: str) -> Shown:
        if not self.show_text:
            return Shown(kind, id, sha256, len(text))
        cut = visible(text[: self.limit]) + (f" [... {len(text)} characters]" if len(text) > self.limit else "")
        return Shown(kind, id, sha256, len(text), cut)


def visible(text: str) -> str:
    r"""Control, format and private characters and half surrogates as escapes; line breaks and tabs stay.

    >>> visible("a\x1b[31mb\u202ec\n")
    'a\\x1b[31mb\\u202ec\n'
    """
    return "".join(
        f"{char}" if char in "\n\t" or unicodedata.category(char)[0] != "C" else ascii(char)[1:-1] for char in text
    )
