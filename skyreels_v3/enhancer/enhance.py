"""--enhance_prompt: a vision-language model rewrites the prompt in more detail, on the main process.

If the model gives no usable answer, the video is made with the user's own prompt, after a warning.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from PIL import Image

from skyreels_v3.cache import FileCache, cache_folder, identity_of
from skyreels_v3.checkpoints.hub import ENHANCER, cached
from skyreels_v3.enhancer.question import EnhancerError, Question
from skyreels_v3.errors import UserError, one_line
from skyreels_v3.inputs import Inputs, last_pictures
from skyreels_v3.media.image import encode_image
from skyreels_v3.media.video_reader import read_frames
from skyreels_v3.prompts import AUTO, TAG, model_prompt, texts, transitions
from skyreels_v3.request import ENHANCER_LOCAL, Request

logger = logging.getLogger(__name__)

MAX_SIDE = 512  # pixels of a picture that the enhancer sees
MAX_LENGTH = 2000  # characters of an answer, far more than the rules ask for
THOUGHTS = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and surrogates
NAMED = re.compile(r"\s*\[?(\w+)\]?[\s:.-]*")  # a transition, at the beginning of an answer
QUOTED = re.compile(
    r'"([^"]+)"|\u201c([^\u201d]+)\u201d|\u201e([^\u201c\u201d]+)[\u201c\u201d]|\u00ab([^\u00bb]+)\u00bb'
    r"|(?<!\w)'([^']+)'(?!\w)|\u2018(.+?)\u2019(?!\w)"
)
# initials and abbreviations with dots, or words with hyphens and apostrophes in them
WORD = re.compile(r"[^\W\d_](?:\.[^\W\d_](?!\w))+|[^\W\d_]\w*(?:['\u2019\u2010\u2011-]\w+)*['\u2019]?")
ENDING = re.compile(r"['\u2019](?:s|m|d|ll|re|ve)?$")  # Anna's, I'm
ABBREVIATED = re.compile(r"(?<!\w)(?:[^\W\d_]|St|Dr|Mrs?|Ms|Mt|Prof|Jr|Sr|Capt|Gen|Lt|Sgt|Col|Rev|Gov|Sen)\.\s*$")
NO_NAMES = frozenset(
    "a an the i it he she they we you his her their its my our your this that these those there here what who where "
    "when while then everyone everybody someone somebody nobody nothing something everything one two three all both "
    "each another today tonight let in on at as and but or with from to of for by after before "
    "pov tv hd uhd hdr cgi vfx dslr fps".split()
)
GERMAN = frozenset(("und", "der", "das", "dem", "ein", "eine", "einen", "einem", "einer"))  # its nouns have capitals
TITLE = 4  # so many capitalized words, and no longer word in lower case, are Title Case
TYPEWRITTEN = str.maketrans(
    dict.fromkeys("\u2018\u2019", "'") | dict.fromkeys("\u201c\u201d", '"') | dict.fromkeys("\u2010\u2011", "-")
)
SENTENCE_START = re.compile(r"(^|[.!?:;\]\n])[\s\"'(\u201c\u2018\u00ab]*$")


def enhance(request: Request, inputs: Inputs) -> Request:
    """The request with the enhancer's prompt, or with its own if there is no usable answer.

    Raises:
        UserError: --enhancer_model cannot be loaded.
    """
    question, cache = question_of(request, inputs), cache_of(request)
    try:
        stored = cache.read(question.key)
        answer = ask(request, question) if stored is None else stored.decode(errors="replace")
        enhanced, notes = read_answer(request, answer)
    except EnhancerError as error:
        logger.warning("--enhance_prompt: %s; the prompt stays as it was", error)
        return request.with_prompt(request.prompt)
    if stored is None:
        cache.write(question.key, answer.encode(errors="replace"))
    for note in notes:
        logger.info(note)
    logger.info("the prompt is now: %s", one_line(enhanced))
    return request.with_prompt(enhanced)


def recall(request: Request, inputs: Inputs) -> Request:
    """The request with the enhancer's prompt if an earlier run cached it; else unchanged."""
    stored = cache_of(request).read(question_of(request, inputs).key)
    try:
        return request if stored is None else request.with_prompt(read_answer(request, stored.decode())[0])
    except (EnhancerError, ValueError):
        return request


def cache_of(request: Request) -> FileCache:
    """The cache of the answers of a request's enhancer."""
    folder: Path | None = None if request.no_cache else cache_folder() / "enhanced"
    if request.enhance_prompt != ENHANCER_LOCAL:
        return FileCache(folder, f"{request.enhance_prompt} {request.enhancer_model}")
    found = model_folder(request)
    return FileCache(folder if found else None, identity_of(ENHANCER.weights(found, "enhancer") if found else ()))


def model_folder(request: Request) -> Path | None:
    """The folder of the model for `local`; None if it must be downloaded."""
    assert request.enhancer_model is not None
    folder = Path(request.enhancer_model).expanduser()
    found = folder if folder.is_dir() else cached(request, request.enhancer_model)
    with suppress(UserError):  # incomplete
        if found is not None:
            ENHANCER.check(found, ENHANCER.flag)
            return found
    return None


def ask(request: Request, question: Question) -> str:
    """The enhancer's answer."""
    assert request.enhancer_model is not None
    if request.enhance_prompt == ENHANCER_LOCAL:
        from skyreels_v3.enhancer.local import ask_local

        return ask_local(Path(request.enhancer_model), request, question)
    from skyreels_v3.enhancer.remote import ask_remote

    return ask_remote(request.enhance_prompt, request.enhancer_model, question)


# The question


def question_of(request: Request, inputs: Inputs) -> Question:
    rules = [texts()["enhancer"], request.task.enhancer_rules]
    prompt = str(request.given["prompt"]).strip().removeprefix(request.task.prompt_prefix.strip()).strip()
    if request.transition is not None and TAG.search(prompt) is None:
        known = transitions()
        if request.transition == AUTO:
            choices = "; ".join(f"[{name}] {transition.sentence}" for name, transition in known.items())
            rules.append(texts()["choose_transition"].format(choices.rstrip(".")))
        else:
            rules.append(texts()["transition"].format(known[request.transition].sentence))
    return Question(" ".join(rules), prompt, tuple(map(small_jpeg, pictures_of(request, inputs))))


def pictures_of(request: Request, inputs: Inputs) -> list[Image.Image]:
    """The pictures that the video starts with, continues from or should show."""
    if inputs.clip is None:
        return [*inputs.images]
    if not request.condition_frames:  # the clip is dubbed
        return [Image.fromarray(next(read_frames(inputs.clip.path, request.task.fps)))]
    return last_pictures(request, inputs)


def small_jpeg(picture: Image.Image) -> bytes:
    small = picture.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    return encode_image(small, "JPEG", quality=90)


# The answer


def read_answer(request: Request, answer: str) -> tuple[str, tuple[str, ...]]:
    """The video model's prompt from the enhancer's answer, and notes on what was added.

    Raises:
        EnhancerError: the answer is empty or too long, or has lost something of the user's prompt.
    """
    text, transition = THOUGHTS.sub("", answer, count=1), request.transition
    text = " ".join(NO_TEXT.sub(" ", text).split())
    given = " ".join(str(request.given["prompt"]).split()).removeprefix(request.task.prompt_prefix.strip())
    chosen = NAMED.match(text) if transition == AUTO and TAG.search(given) is None else None
    if chosen is not None and chosen[1].lower() in transitions():
        transition, text = chosen[1].lower(), text[chosen.end() :]
    if text[:1] == text[-1:] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    if not text:
        raise EnhancerError("the answer is empty")
    if len(text) > MAX_LENGTH:
        raise EnhancerError(f"the answer has {len(text)} characters, more than {MAX_LENGTH}")
    if sorted(TAG.findall(text)) != sorted(TAG.findall(given)):
        raise EnhancerError("the answer's tags are not the prompt's")
    found = plain(text)
    lost = [each for each, pattern in to_keep(given).items() if pattern.search(found) is None]
    if lost:
        raise EnhancerError(f"the answer lacks {one_line(', '.join(lost[:3]))}")
    return model_prompt(request.task, text, transition)


def to_keep(prompt: str) -> dict[str, re.Pattern[str]]:
    """What a new prompt must keep, quoted words and names, each with a pattern that finds it in `plain` text."""
    prompt = unicodedata.normalize("NFC", prompt)
    quoted = [next(filter(None, match.groups())).strip() for match in QUOTED.finditer(prompt)]
    patterns = {text: whole(re.escape(plain(text))) for text in quoted}
    return patterns | {name: pattern_of(name) for name in names_in(QUOTED.sub(" , ", TAG.sub("]", prompt)))}


def names_in(text: str) -> Iterator[str]:
    """Yield the names in a text, which are capitalized words.

    At the start of a sentence, a name also needs a capital inside it, a possessive ending, or a following verb that
    rarely follows a noun without an article. Texts in which all words or all nouns have capitals yield none.
    """
    words = [(ENDING.sub("", match[0]), match) for match in WORD.finditer(text)]
    plain_words = {word for word, _ in words if word.islower()}
    if sum(word[0].isupper() for word, _ in words) >= TITLE and not any(len(word) > 3 for word in plain_words):
        return
    if len(GERMAN & plain_words) > 1:
        return
    for word, match in words:
        before, behind = text[: match.start()], text[match.end() :]
        if len(word) == 1 or word.lower() in NO_NAMES or word.islower():
            continue
        begins = SENTENCE_START.search(before) is not None and ABBREVIATED.search(before) is None
        owns = match[0] != word
        acts = (following := WORD.match(behind.lstrip())) is not None and following[0] in texts()["after_names"]
        if not begins or owns or acts or not word[1:].islower():
            yield word


def pattern_of(name: str) -> re.Pattern[str]:
    """A pattern for a name, with or without dots, hyphens, accents or a plural s; abbreviations are case-sensitive."""
    pieces = map(re.escape, re.findall(r"\w+", plain(name)))
    return whole(r"\W{0,2}".join(pieces) + "s?", 0 if name.isupper() else re.IGNORECASE)


def whole(pattern: str, flags: int = 0) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){pattern}(?!\w)", flags)


def plain(text: str) -> str:
    """A text without accents, and with ASCII apostrophes, quotes and hyphens."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(letters).translate(TYPEWRITTEN)
