"""The tiny transformer, its tokenizer, save, load and sample.

    python model.py model "Once upon a time"       # a story from the trained model
    python model.py model "The dog" --num 3        # three stories
    python model.py model --temperature 0          # always the likeliest next token

Notable:
- The model is a Llama: RMSNorm, rotary positions, SwiGLU, no biases. Tensor names and `config.json`
  are those of the Hugging Face family, so `AutoModelForCausalLM.from_pretrained("model")` loads
  a model that a run wrote, and `load` here reads a Llama that others wrote.
- A token is a byte, or `<|endoftext|>`, which ends a story: 257 in all. `AutoTokenizer` gives the
  same ids, from the `tokenizer.json` that is written beside the weights.
- If a config asks for something that is not implemented here, `Config.from_json` refuses it and
  names the field; `load` then hands the folder to transformers, if that is installed.
- Rotary tables are computed anew in each forward pass, in float32: this takes microseconds, a long
  context keeps no memory, and a cast of the model to bfloat16 cannot make the tables coarse.
- The folder of a run that still trains can be read too: its newest whole checkpoint counts.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import protocol

END_OF_STORY = "<|endoftext|>"
WEIGHTS = "model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Upper bounds for a config, which may come from the network: above every real model, and below the
# sizes whose products overflow. A layer takes memory even before its weights exist, hence the second.
MAX_SIZE = 1 << 24
MAX_LAYERS = 1 << 12
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)

# --- Configuration --------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The fields of a Llama's `config.json` that matter here. Raises ValueError for a bad value."""

    vocab_size: int = 257
    hidden_size: int = 128
    intermediate_size: int = 344  # width of the SwiGLU, best about 8/3 of hidden_size
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # fewer than num_attention_heads: grouped queries
    max_position_embeddings: int = 256  # longest sequence, in tokens
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True  # one matrix for both the embedding and the output layer
    initializer_range: float = 0.02
    bos_token_id: int | None = 256
    eos_token_id: int | list | None = 256
    dtype: str = "float32"

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in SIZES:
            value = getattr(self, name)
            most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} is {value!r}: give a whole number from 1 to {most}")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < 1e30:
                raise ValueError(f"{name} is {value!r}: give a positive number below 1e30")
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError(f"tie_word_embeddings is {self.tie_word_embeddings!r}, not a boolean")
        if self.dtype not in tuple(DTYPES):
            raise ValueError(f"dtype is {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads):  # rotary positions turn pairs within a head
            raise ValueError(
                f"hidden_size {self.hidden_size} is no even multiple of num_attention_heads {heads}"
            )
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {heads}"
            )

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, text):
        """The Config in the text of a `config.json`. Raises ValueError, which names the field, if the
        text is malformed or asks for something that is not implemented here."""
        raw = parse_json(text, "config.json")
        reason = unsupported(raw)
        if reason:
            raise ValueError(f"config.json has {reason}: use transformers for such a model")
        missing = [name for name in SIZES if name not in raw and name != "num_key_value_heads"]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        # An absent field has the family's default, not the one of our own small model.
        known = {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
        names = {field.name for field in dataclasses.fields(cls)}
        known.update({name: value for name, value in raw.items() if name in names})
        known["dtype"] = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        rope = raw.get("rope_parameters") or {}
        known["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
        return cls(**known)

    def to_json(self):
        """The text of a `config.json` that transformers 4 and 5 read."""
        fields = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **dataclasses.asdict(self),  # with rope_theta where transformers 4 looks for it
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "use_cache": True,
        }
        return json.dumps(fields, indent=2) + "\n"


def parse_json(text, name):
    """The value of a JSON text. Raises ValueError, which names the file."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None


def unsupported(config):
    """The first thing that a parsed `config.json` asks for and `Llama` cannot do, in words; else
    None."""
    if not isinstance(config, dict):
        return "no object at its top level"
    ours = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "quantization_config": None,
    }
    if type(config.get("hidden_size")) is type(config.get("num_attention_heads")) is int:
        ours["head_dim"] = config["hidden_size"] / (config["num_attention_heads"] or 1)
    for name, value in ours.items():
        if config.get(name) != value and (config.get(name) is not None or name == "model_type"):
            return f"{name} {config.get(name)!r}, not {value!r}"
    for name in ("rope_scaling", "rope_parameters"):  # the names in transformers 4 and 5
        rope = config.get(name) or {}
        plain = isinstance(rope, dict) and rope.get("partial_rotary_factor", 1.0) == 1.0
        if not plain or rope.get("rope_type", rope.get("type", "default")) != "default":
            return f"{name} {rope!r}, not the plain rotary positions"
    return None


def supports(config):
    """Whether `Llama` implements the model of a parsed `config.json` (a dict); otherwise transformers
    may. Sizes are not judged here: `Config.from_json` names a bad one."""
    return unsupported(config) is None


# --- The model ------------------------------------------------------------------------------


def rotary_tables(length, head_dim, theta, device):
    """(cos, sin) of the angles of all positions: both float32 [length, 1, head_dim]. The first half
    of `sin` is negated, so that a head is rotated by `x * cos + roll(x) * sin`, in few passes over
    memory."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / theta**exponents)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """The heads x [B, T, heads, head_dim], turned by their positions."""
    return x * cos.to(x.dtype) + x.roll(x.size(-1) // 2, -1) * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads < config.num_attention_heads
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), cos, sin).transpose(1, 2)
        k = rotate(self.k_proj(x).view(heads), cos, sin).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A decoder-only transformer. The same `torch.manual_seed` and config give the same first weights,
    to the bit.

    The state_dict has the names of the Hugging Face family. With tied embeddings there is no
    `lm_head` at all, so the shared matrix is one parameter under one name."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
            }
        )
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = config.initializer_range
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    # Each layer adds two of these outputs to the residual stream. With smaller
                    # weights the size of the stream does not grow with the number of layers.
                    std /= math.sqrt(2 * config.num_hidden_layers)
                nn.init.normal_(parameter, std=std)
        self.to(DTYPES[config.dtype])

    def forward(self, ids, targets=None):
        """Logits [B, T, vocab_size] for ids (int64 [B, T]), in the model's dtype. Given targets (int64
        [B, T], the next token at each place; -100 is left out), the mean cross-entropy instead, a
        float32 scalar. Raises ValueError if T is over max_position_embeddings."""
        config = self.config
        length = ids.size(1)
        if length > config.max_position_embeddings:
            most = config.max_position_embeddings
            raise ValueError(f"{length} tokens in a sequence; max_position_embeddings is {most}")
        cos, sin = rotary_tables(length, config.head_dim, config.rope_theta, ids.device)
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, cos, sin)
        x = self.model["norm"](x)
        head = self.model["embed_tokens"] if self.lm_head is None else self.lm_head
        logits = F.linear(x, head.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def make_optimizers(model, train):
    """{name: optimizer} for a model of ours or of transformers, in the order in which they step. With
    `train.optimizer` "muon", Muon has the matrices within the model, and AdamW the rest: embeddings, head,
    gains and biases. Both take one learning rate: Muon's steps are made as large as AdamW's (arXiv
    2502.16982). Weight decay is on matrices only: shrinking a gain or a bias regularizes nothing."""
    head = getattr(model, "get_output_embeddings", lambda: model.lm_head)()
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    outer = {id(table) for table in [*tables, *([head.weight] if head is not None else [])]}
    inner, matrices, vectors = [], [], []
    for p in (p for p in model.parameters() if p.requires_grad):
        is_inner = train.optimizer == "muon" and p.dim() == 2 and id(p) not in outer
        (inner if is_inner else matrices if p.dim() >= 2 else vectors).append(p)
    rate, decay, betas = train.learning_rate, train.weight_decay, (train.beta1, train.beta2)
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = {"adamw": torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)}
    if not inner:
        return adamw
    scale = "match_rms_adamw"
    muon = torch.optim.Muon(inner, lr=rate, weight_decay=decay, adjust_lr_fn=scale)
    return {"muon": muon, **adamw}


# --- Tokenizers -----------------------------------------------------------------------------


class ByteTokenizer:
    """UTF-8 bytes as the ids 0 to 255, and `<|endoftext|>` as 256, wherever it occurs in a text."""

    vocab_size = 257
    eos_id = bos_id = 256  # the token after a story also stands before the next one

    def encode(self, text):
        """Ids (list of int) of any text. A lone surrogate, which UTF-8 cannot express, becomes `?`."""
        ids = []
        for story in text.split(END_OF_STORY):
            ids += [*story.encode(errors="replace"), self.eos_id]
        return ids[:-1]

    def decode(self, ids):
        """Text of ids from 0 to 256. Bytes that are not UTF-8 become U+FFFD."""
        end = END_OF_STORY.encode()
        return b"".join(end if i == 256 else bytes([i]) for i in ids).decode(errors="replace")


class PretrainedTokenizer:
    """The tokenizer of a folder in the Hugging Face layout, with the interface of ByteTokenizer.
    Raises ImportError, OSError, ValueError."""

    def __init__(self, folder):
        auto = transformers_for("the tokenizer").AutoTokenizer
        self.tokenizer = auto.from_pretrained(folder, local_files_only=True)
        self.vocab_size = len(self.tokenizer)
        self.eos_id = self.tokenizer.eos_token_id
        self.bos_id = self.tokenizer.bos_token_id

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def tokenizer_files():
    """{file name: text} of files that make `AutoTokenizer.from_pretrained` give the byte tokenizer: a
    byte-level BPE without merges. Such a BPE spells each byte as one printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    vocab |= {chr(256 + i): byte for i, byte in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    end = {"id": ByteTokenizer.eos_id, "content": END_OF_STORY, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [end | flags],
        "pre_tokenizer": byte_level | {"use_regex": False},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"bos_token": END_OF_STORY, "eos_token": END_OF_STORY}
    return {
        "tokenizer.json": json.dumps(tokenizer, indent=1) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


# --- Save and load --------------------------------------------------------------------------


def descriptive_files(config):
    """{file name: text} of all files beside the weights of a Llama with this config. The byte
    tokenizer's files are among them if the vocabulary has its size."""
    generation = {"do_sample": True, "temperature": 0.8, "top_k": 40}
    generation |= {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    files = {
        "config.json": config.to_json(),
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    return files | (tokenizer_files() if config.vocab_size == ByteTokenizer.vocab_size else {})


def save(model, folder, files=None):
    """Write a Llama's `model.safetensors` and descriptive files into a folder, by default the files
    of its config. Each file appears whole or not at all, the weights last. Raises OSError, and
    ValueError for a file name that does not describe a model."""
    files = descriptive_files(model.config) if files is None else files
    strange = sorted(set(files) - set(protocol.FILE_NAMES))
    if strange:
        raise ValueError(f"{strange[0]!r} is not the name of a file that describes a model")
    os.makedirs(folder, exist_ok=True)
    for name, text in files.items():
        protocol.write_beside(Path(folder, name), lambda file, text=text: file.write(text.encode()))
    protocol.save_file(Path(folder, WEIGHTS), model.state_dict())


def find_model(folder):
    """The folder itself if it holds weights, else its newest whole checkpoint, which is then named
    on stderr. Raises FileNotFoundError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / WEIGHTS).is_file():
        return folder
    checkpoints = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(checkpoints, key=lambda path: int(path.name[11:]), reverse=True):
        if (path / "config.json").is_file() and (path / WEIGHTS).is_file():
            print(f"{folder} has no {WEIGHTS} yet; reading {path}", file=sys.stderr)
            return path
    raise FileNotFoundError(
        f"{folder} has no {WEIGHTS} and no whole checkpoint-N: train first, or wait for the first"
    )


def load(folder):
    """(model, tokenizer) of a folder that a run or `save_pretrained` wrote, on the CPU. A model that
    `Llama` does not implement comes from transformers. Raises OSError, ValueError, ImportError and
    protocol.ProtocolError, with the reason in one line."""
    folder = find_model(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, which says what the weights are")
    text = path.read_text(encoding="utf-8")
    raw = parse_json(text, path)
    reason = unsupported(raw)
    if reason:
        auto = transformers_for(f"a config.json with {reason}").AutoModelForCausalLM
        model = auto.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        return model, PretrainedTokenizer(folder)
    config = Config.from_json(text)
    with torch.device("meta"):  # a model without memory, until the shapes agree
        model = Llama(config)
    tensors = protocol.load_file(folder / WEIGHTS)[1]
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'no such tensor')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            f"{folder / WEIGHTS} does not fit its config.json: {'; '.join(wrong[:4])}{more}"
        )
    model.to_empty(device="cpu").load_state_dict(tensors)
    return model, find_tokenizer(folder)


def find_tokenizer(folder):
    """The ByteTokenizer if the folder's `tokenizer.json` describes that one, else the folder's
    tokenizer. Raises ImportError, OSError, ValueError."""
    path = Path(folder, "tokenizer.json")
    own = tokenizer_files()["tokenizer.json"]
    if path.is_file() and parse_json(path.read_text(encoding="utf-8"), path) == json.loads(own):
        return ByteTokenizer()
    return PretrainedTokenizer(folder)


def transformers_for(what):
    """The transformers module. Raises ImportError, which says that `what` needs it."""
    try:
        import transformers  # optional, slow to import, not needed for our own models
    except ImportError:
        raise ImportError(f"{what} needs transformers: pip install transformers") from None
    return transformers


# --- Sampling -------------------------------------------------------------------------------


@torch.no_grad()
def sample(model, tokenizer, prompt, max_tokens=400, temperature=0.8, top_k=40, seed=0):
    """Yield the text with which the model continues a prompt, in pieces of whole characters, up to
    the end of the story or `max_tokens`. Temperature 0 takes the likeliest token, top_k 0 considers
    all tokens; the same seed gives the same text. Raises ValueError."""
    if not 0 <= temperature < math.inf or top_k < 0 or max_tokens < 0:
        raise ValueError("temperature, top_k and max_tokens must be finite and not negative")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    context = model.config.max_position_embeddings
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    start = len(ids)  # place of the first new token
    sent = 0  # characters of the new text that have been yielded
    for _ in range(max_tokens):
        logits = model(torch.tensor([ids[-context:]], device=device))
        logits = getattr(logits, "logits", logits)[0, -1].float().cpu()  # transformers wraps them
        values, choices = logits.topk(min(top_k or logits.numel(), logits.numel()))
        pick = torch.zeros(1, dtype=torch.int64)
        if temperature > 0:
            pick = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
        token = choices[pick].item()
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        text = tokenizer.decode(ids[start:])
        if not text.endswith("\ufffd"):  # the last character may still lack bytes
            yield text[sent:]
            sent = len(text)
    rest = tokenizer.decode(ids[start:])[sent:]
    if rest:
        yield rest


def main():
    """Print stories from a trained model, as the command line asks."""
    parser = argparse.ArgumentParser(description="Print a story from a trained model.")
    parser.add_argument("folder", help="model folder, finished or still in training")
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--max-tokens", type=int, default=400, help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="default %(default)s")
    parser.add_argument("--top-k", type=int, default=40, help="default %(default)s; 0: all tokens")
    parser.add_argument("--seed", type=int, default=0, help="default 0; each gives another story")
    parser.add_argument("--num", type=int, default=1, help="stories, from seed, seed + 1, ...")
    args = parser.parse_args()
    options = (args.max_tokens, args.temperature, args.top_k)
    sys.stdout.reconfigure(errors="replace")  # not every terminal shows every character
    try:
        model, tokenizer = load(args.folder)
        for seed in range(args.seed, args.seed + args.num):
            text = args.prompt
            for piece in sample(model, tokenizer, args.prompt, *options, seed):
                print(text + piece, end="", flush=True)
                text = ""
            print(text if seed + 1 == args.seed + args.num else text + "\n")
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, ImportError, protocol.ProtocolError) as error:
        sys.exit("model.py: " + " ".join(str(error).split()))


if __name__ == "__main__":
    main()
