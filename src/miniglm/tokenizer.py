"""Text to token ids and back: training and loading byte-level BPE, GLM-4's control tokens and chat form, streaming.

What a user types is only ever ordinary text here: control tokens are put in by `encode_chat` and
`encode_training_example`, never by a string that looks like one. This file does not know the model, token arrays on
disk, or how text is generated; `tokenizers` does the merging.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from miniglm.errors import MiniGLMError
from miniglm.files import write_whole
from miniglm.template import ChatTemplate, read_template

if TYPE_CHECKING:
    import tiktoken

# Encode on all cores, and say so, or `tokenizers` warns at every fork. A forked process has lost the threads for that:
# it is told so, or it would hang.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))

# GLM-4's control tokens in GLM-4's order; their ids follow the ordinary vocabulary's.
CONTROL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
ROLES = ("system", "user", "assistant", "observation")

# GLM-4's pre-tokenizer, letter by letter: llama.cpp has it built in (`chatglm-bpe`).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What `Tokenizer.encode_chat` does, for transformers, vLLM and others that render the conversation to text first.
CHAT_TEMPLATE = (
    "[gMASK]<sop>"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'observation'] %}"
    "{{ raise_exception('unknown role: ' ~ message['role']) }}"
    "{% endif %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

MIN_VOCAB_SIZE = 256 + len(CONTROL_TOKENS)
# More text than this does not change a vocabulary of this size much, but costs the trainer about 250 bytes a character.
MAX_TRAINING_CHARACTERS = 5_000_000
TRAINING_PIECE = 64  # characters
ENCODING_PIECE = 8_192  # characters
ENCODING_BATCH = 64_000  # characters handed to `tokenizers` at once: it keeps about 100 bytes a token meanwhile

# Every pre-tokenizer of GPT-2's kind ends a token where a run of letters or digits meets one of these, whatever
# stands around it. So text cut there gives the tokens of the uncut text.
_SAFE_CUT = re.compile(r"[A-Za-z0-9\u4e00-\u9fff](?=[ \n\r，。！？；：、,.])")

# Survives only an encoding that is byte-level and adds, drops and changes nothing.
_PROBE = "a  b\n\n 你好，\u3000🙂 I'LL x\t\r\n12345\u00a0\ufffd é."


def _byte_characters() -> dict[int, str]:
    """GPT-2's stand-in for each byte in a vocabulary: printable Latin-1 is itself, the rest follows from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_CHARACTER_OF_BYTE = _byte_characters()
_BYTE_OF_CHARACTER = {character: byte for byte, character in _CHARACTER_OF_BYTE.items()}


def repair_surrogates(text: str) -> str:
    """Joins surrogate pairs to the character they stand for; a lone surrogate becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def default_vocab_size(characters: int) -> int:
    """The vocabulary size for a corpus: 4,096 at 600,000 characters, growing with the square root.

    A multiple of 256 from 512 to 32,768. The square root is how a text's number of distinct words grows (Heaps' law).
    """
    size = 256 * round(4096 * sqrt(characters / 600_000) / 256)
    return min(max(size, 512), 32_768)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int | None, corpus_characters: int) -> Tokenizer:
    """Trains byte-level BPE on `texts`. The same texts give the same tokenizer.

    Args:
        texts: read once, so a generator will do; a line of any length will do too.
        vocab_size: with the 256 bytes and the control tokens. None: `default_vocab_size`, or less if there is less.
        corpus_characters: about how many characters `texts` has together. Of more than `MAX_TRAINING_CHARACTERS`,
            an evenly spread sample is used.

    Raises:
        MiniGLMError: `vocab_size` is smaller than the fixed part, or larger than the corpus can give.
    """
    if vocab_size is not None and vocab_size < MIN_VOCAB_SIZE:
        raise MiniGLMError(
            f"vocab_size = {vocab_size} 太小：256 个字节加 {len(CONTROL_TOKENS)} 个控制符就有 {MIN_VOCAB_SIZE} 个",
            fix=f"把 vocab_size 调到 {MIN_VOCAB_SIZE} 以上，或者不写，让它由语料决定",
        )
    wanted = default_vocab_size(corpus_characters) if vocab_size is None else vocab_size
    # An unbroken run of letters is one word to the trainer, whose work grows with the square of a word's length.
    pieces = (piece for text in texts for piece in safe_pieces(repair_surrogates(text), TRAINING_PIECE))
    sample = islice(pieces, 0, None, max(1, ceil(corpus_characters / MAX_TRAINING_CHARACTERS)))
    trainer = trainers.BpeTrainer(
        vocab_size=wanted - len(CONTROL_TOKENS),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    hf = byte_level(models.BPE(), PATTERN)
    hf.train_from_iterator(sample, trainer)
    tokenizer = Tokenizer(hf)
    if vocab_size is not None and tokenizer.vocab_size < vocab_size:
        raise MiniGLMError(
            f"语料太小：只能得到 {tokenizer.vocab_size} 个词元，不够 vocab_size = {vocab_size}",
            fix=f"把 vocab_size 降到 {tokenizer.vocab_size} 或以下，或者不写，让它由语料决定",
        )
    return tokenizer


def resolve_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer a recipe names: `"gpt2"`, or the path of a tokenizer.json or of a folder with one.

    Raises:
        MiniGLMError: see `load_gpt2_tokenizer` and `Tokenizer.load`.
    """
    return load_gpt2_tokenizer() if spec == "gpt2" else Tokenizer.load(spec)


def load_gpt2_tokenizer() -> Tokenizer:
    """GPT-2's vocabulary through tiktoken, which downloads it on first use and keeps it in `TIKTOKEN_CACHE_DIR`.

    Raises:
        MiniGLMError: tiktoken is not installed, or cannot get the vocabulary.
    """
    other = '或者写 tokenizer = "tokenizer.json 的路径"，或者不写，用语料训练一个'
    try:
        import tiktoken
    except ImportError as error:
        raise MiniGLMError(
            'tokenizer = "gpt2" 需要 tiktoken，而它没有安装', fix=f"pip install 'miniglm-chat[gpt2]'；{other}"
        ) from error
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
        raise MiniGLMError(
            f'tokenizer = "gpt2" 的词表下载不了（{type(error).__name__}）',
            fix=f"联网运行一次；或者把环境变量 TIKTOKEN_CACHE_DIR 指向已有这个词表的 tiktoken 缓存文件夹；{other}",
        ) from error
    return from_tiktoken(encoding)


def from_tiktoken(encoding: tiktoken.Encoding) -> Tokenizer:
    """The same ordinary vocabulary, ids and pattern as `encoding`, with GLM-4's control tokens after it.

    tiktoken keeps no merges, only ranks: the merge that made a token is the pair which is left when its bytes are
    merged with the ranks below its own. (GPT-2's own `<|endoftext|>` gets its usual id, being the first after.)

    Raises:
        ValueError: the ranks are not 0, 1, 2, …, so the control tokens' ids would collide with others.
    """
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    ordered = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in ordered] != list(range(len(ordered))):
        raise ValueError(f"the ranks of tiktoken's {encoding.name!r} have holes")

    def written(token: bytes) -> str:
        return "".join(_CHARACTER_OF_BYTE[byte] for byte in token)

    merges = []
    for token in ordered:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
            best = min(joined)
            if best >= ranks[token]:
                break
            i = joined.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((written(parts[0]), written(parts[1])))
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    # `ignore_merges`: as in tiktoken, a word that is a token is that token, though no merges lead to it.
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True)
    # "{1,3}+" is possessive in Rust's syntax but "repeated" in Oniguruma's; nothing follows it, so greedy is the same.
    return Tokenizer(byte_level(model, re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", encoding._pat_str)))


class Tokenizer:
    """Byte-level BPE with GLM-4's control tokens.

    Attributes:
        hf: the `tokenizers.Tokenizer` underneath.
        vocab_size: the number of rows an embedding needs: the highest id and one.
        control_ids: ids that stand for no text. `encode` never returns one.
        prefix: what every sequence starts with, `[gMASK]<sop>`.
        stop_ids: ids that end an answer.
        template: the chat template of the folder it came from, where that is not our own form.
    """

    def __init__(self, hf: tokenizers.Tokenizer, *, path: Path | None = None) -> None:
        """Takes `hf` over, adding the control tokens it lacks; `path` is where it came from, for messages.

        Raises:
            MiniGLMError: it is not byte-level BPE, or does not give back the text it encodes.
        """
        self.hf = hf
        vocabulary: dict[str, int] = hf.get_vocab(with_added_tokens=False)
        if not isinstance(hf.model, models.BPE) or not _BYTE_OF_CHARACTER.keys() <= vocabulary.keys():
            raise _not_accepted("不是字节级 BPE 分词器", path)
        hf.model.dropout = None  # a training trick that makes encoding random
        hf.no_padding()
        hf.no_truncation()
        # Also makes those special that are in the file as plain tokens, which text would be searched for.
        hf.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
        hf.encode_special_tokens = True  # which means: as ordinary text

        added = hf.get_added_tokens_decoder()
        self.vocab_size = max(max(vocabulary.values()), max(added)) + 1
        self.control_ids = frozenset(id for id, token in added.items() if token.special)
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        for token, id in vocabulary.items():
            if id not in added:
                self._bytes[id] = _bytes_of(token)
        for id, added_token in added.items():
            self._bytes[id] = b"" if added_token.special else added_token.content.encode()
        self._control_text = {id: added[id].content for id in self.control_ids}

        id_of = {token.content: id for id, token in added.items()}
        if len({*vocabulary.values(), *added}) < len({*vocabulary, *id_of}):
            raise _not_accepted("词表里有两个词元用同一个编号", path)
        self.end_of_text = id_of["<|endoftext|>"]
        self.gmask, self.sop = id_of["[gMASK]"], id_of["<sop>"]
        self.system, self.user = id_of["<|system|>"], id_of["<|user|>"]
        self.assistant, self.observation = id_of["<|assistant|>"], id_of["<|observation|>"]
        self.prefix = [self.gmask, self.sop]
        self.stop_ids = frozenset({self.end_of_text, self.user, self.observation})
        self._id_of_role = {role: id_of[f"<|{role}|>"] for role in ROLES}
        self.template: ChatTemplate | None = None
        self._files: dict[str, bytes] = {}  # of the folder that brought the template; `save` writes them as they are

        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise _not_accepted("编码后再解码得不到原文", path)
        if any(not self.control_ids.isdisjoint(self.encode(token)) for token in CONTROL_TOKENS):
            raise _not_accepted("普通文本会被编码成控制符", path)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Opens a tokenizer.json, or the one in a folder. Control tokens it lacks are added after its vocabulary.

        Raises:
            MiniGLMError: it is missing, broken, or not a byte-level BPE tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = file.read_text(encoding="utf-8")
            data = json.loads(text)
        except FileNotFoundError as error:
            fix = '应当是 tokenizer.json、含有它的文件夹，或者 "gpt2"'
            raise MiniGLMError("找不到分词器文件", path=file, fix=fix) from error
        except OSError as error:
            raise MiniGLMError(f"读不了分词器文件（{error.strerror}）", path=file) from error
        except json.JSONDecodeError as error:
            raise MiniGLMError(
                "不是完整的 JSON，文件可能被截断", path=file, line=error.lineno, fix="重新复制或下载这个文件"
            ) from error
        except (UnicodeDecodeError, RecursionError) as error:
            raise _not_accepted("不是 JSON 文本", file) from error
        model = data.get("model") if isinstance(data, dict) else None
        if not isinstance(model, dict):
            raise _not_accepted("没有 model 这一项，不是 tokenizers 的 tokenizer.json", file)
        if model.get("type", "BPE") != "BPE":
            raise _not_accepted(f"分词模型是 {model['type']}", file)
        try:
            hf = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise _not_accepted(f"tokenizers 打不开它（{error}）", file) from error
        tokenizer = cls(hf, path=file)
        if path.is_dir():
            tokenizer._adopt(path)
        return tokenizer

    def _adopt(self, folder: Path) -> None:
        """Takes over the chat template and the ends of an answer that a folder names, if they are not our own."""
        source = read_template(folder)
        if source is None or source == CHAT_TEMPLATE:
            return
        files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
        self._files = {name: (folder / name).read_bytes() for name in files if (folder / name).exists()}
        try:
            config = json.loads(self._files.get("tokenizer_config.json", b"{}"))
            names = {
                k: v if isinstance(v, str) else v["content"] for k, v in config.items() if k.endswith("_token") and v
            }
        except (ValueError, TypeError, LookupError, AttributeError):
            names = {}
        control = {text: id for id, text in self._control_text.items()}
        self.template = ChatTemplate(source, control, names, folder)
        if not any(text in source for text in control):
            self.prefix = self.encode("\n")  # a model that knows no control token: what paragraphs begin after
        ends: Any = None
        for name in ("generation_config.json", "config.json"):
            if ends is None and (folder / name).exists():
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    ends = json.loads((folder / name).read_text("utf-8")).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        self.stop_ids |= {id for id in ends if isinstance(id, int) and 0 <= id < self.vocab_size}

    def save(self, folder: str | Path, *, model_max_length: int | None = None) -> None:
        """Writes tokenizer.json and tokenizer_config.json, each whole or not at all; transformers opens the folder.

        Args:
            folder: made if it is not there.
            model_max_length: the model's context, for programs that cut their input to it.

        Raises:
            MiniGLMError: the folder cannot be written to.
        """
        if self.template is not None:
            for name, content in self._files.items():
                write_whole(Path(folder) / name, content)
            return
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(CONTROL_TOKENS),
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "chat_template": CHAT_TEMPLATE,
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        write_whole(Path(folder) / "tokenizer.json", self.hf.to_str(pretty=True))
        write_whole(Path(folder) / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: control tokens written in it are text as well. See `repair_surrogates`."""
        if len(text) > ENCODING_PIECE:
            return self.encode_batch([text])[0]
        return self.hf.encode(repair_surrogates(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text, on all cores.

        Long texts are encoded in pieces, to bound memory. That changes no id unless a text has no space or punctuation
        mark in more than `ENCODING_PIECE` characters.
        """
        results: list[list[int]] = []
        pieces: list[str] = []
        owners: list[list[int]] = []
        waiting = 0

        def flush() -> None:
            encodings = self.hf.encode_batch_fast(pieces, add_special_tokens=False)
            for owner, encoding in zip(owners, encodings, strict=True):
                owner += encoding.ids
            pieces.clear()
            owners.clear()

        for text in texts:
            results.append([])
            for piece in safe_pieces(repair_surrogates(text), ENCODING_PIECE):
                pieces.append(piece)
                owners.append(results[-1])
                waiting += len(piece)
                if waiting >= ENCODING_BATCH:
                    flush()
                    waiting = 0
        flush()
        return results

    def allow_unused(self, rows: int) -> None:
        """Takes ids from the vocabulary's end to `rows`, which a model's embedding may have but no token uses, for
        ids of no text."""
        self._bytes += [b""] * (rows - len(self._bytes))

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for; none for a control token.

        Raises:
            ValueError: there is no such token.
        """
        found = self._bytes[id] if 0 <= id < len(self._bytes) else None
        if found is None:
            raise ValueError(f"no token has the id {id}; the vocabulary has {self.vocab_size}")
        return found

    def decode(self, ids: Iterable[int], *, skip_control: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD; control tokens are left out or written.

        Raises:
            ValueError: there is no such token.
        """
        names = {} if skip_control else self._control_text
        data = b"".join(names[id].encode() if id in names else self.token_bytes(id) for id in ids)
        return data.decode("utf-8", "replace")

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """A conversation in GLM-4's form: `[gMASK]<sop>`, then `<|role|>\\n` and the content of each message.

        Nothing closes a turn but the next turn's role token. The generation prompt is `<|assistant|>\\n`.

        Args:
            messages: mappings with "role" (one of `ROLES`) and "content".
            add_generation_prompt: whether an answer is to follow.

        Raises:
            MiniGLMError: a message is not of that form.
        """
        for number, message in enumerate(messages, start=1):
            role, content = message.get("role"), message.get("content")
            if role not in self._id_of_role:
                raise MiniGLMError(f"第 {number} 条消息的 role 是 {role!r}，应当是 {'、'.join(ROLES)} 之一")
            if not isinstance(content, str):
                raise MiniGLMError(f"第 {number} 条消息的 content 不是字符串")
        if self.template is not None:
            return self.template.encode(messages, add_generation_prompt, self.encode)
        ids = list(self.prefix)
        for message in messages:
            # In one piece with the newline, as it is for a program that renders the conversation to text first.
            ids += [self._id_of_role[message["role"]], *self.encode("\n" + message["content"])]
        if add_generation_prompt:
            ids += [self.assistant, *self.encode("\n")]
        return ids

    def encode_training_example(
        self, turns: Sequence[tuple[str, str]], system: str = ""
    ) -> tuple[list[int], list[int]]:
        """A finished conversation, and for each of its tokens 1 if the model shall learn to say it, else 0.

        Learnt are every answer and the one token that closes it: the next turn's `<|user|>`, at the end
        `<|endoftext|>`. What comes before an answer is what generation starts from, `<|assistant|>\\n` included.

        Args:
            turns: (question, answer) pairs, at least one.
            system: the system message; empty for none.

        Raises:
            ValueError: there are no turns.
        """
        if not turns:
            raise ValueError("a training example needs at least one turn")
        if self.template is not None:
            messages = [{"role": "system", "content": system}] if system else []
            for question, answer in turns:
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return self.template.encode_training(messages, self.end_of_text, self.encode)
        ids = list(self.prefix)
        if system:
            ids += [self.system, *self.encode("\n" + system)]
        targets = [0] * len(ids)
        for number, (question, answer) in enumerate(turns):
            prompt = [*self.encode("\n" + question), self.assistant, *self.encode("\n")]
            reply = self.encode(answer)
            ids += [self.user, *prompt, *reply]
            targets += [int(number > 0)] + [0] * len(prompt) + [1] * len(reply)
        return [*ids, self.end_of_text], [*targets, 1]


class StreamingDetokenizer:
    """Text from tokens that come one at a time.

    Contract: what `add` and `finish` return, joined, is `tokenizer.decode` of all the ids, for any ids. No piece holds
    part of a character: bytes that may still become one are held back until they do or cannot. Each token costs the
    same, however many came before.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, id: int) -> str:
        """The text that has become certain with this token; may be empty.

        Raises:
            ValueError: there is no such token.
        """
        return self._decoder.decode(self._token_bytes(id))

    def finish(self) -> str:
        """What was held back: U+FFFD if the last character is incomplete. Afterwards a new text can begin."""
        return self._decoder.decode(b"", final=True)


def safe_pieces(text: str, size: int) -> Iterator[str]:
    """Cuts `text` into pieces of `size` to twice `size` characters, where that changes no token if at all possible."""
    start = 0
    while len(text) - start > size:
        cut = _SAFE_CUT.search(text, start + size, start + 2 * size)
        end = cut.end() if cut else start + 2 * size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def byte_alphabet() -> pre_tokenizers.PreTokenizer:
    """Writes each byte as its stand-in and cuts nothing."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)


def byte_level(model: models.BPE, pattern: str) -> tokenizers.Tokenizer:
    """Byte-level BPE, words of which are what `pattern` finds."""
    hf = tokenizers.Tokenizer(model)
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            byte_alphabet(),
        ]
    )
    hf.decoder = decoders.ByteLevel()
    return hf


def _bytes_of(token: str) -> bytes:
    """The bytes that a vocabulary's entry is written for; entries outside the byte alphabet can only be themselves."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def _not_accepted(what: str, path: Path | None) -> MiniGLMError:
    fix = "这里用的是字节级 BPE 的 tokenizer.json（GLM-4、GPT-2、Qwen、Llama 3 一类；SentencePiece 和 WordPiece 不行）"
    return MiniGLMError(f"不能用作分词器：{what}", path=path, fix=fix)
