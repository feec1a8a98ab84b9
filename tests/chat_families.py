"""Chat templates with the observable behaviour of eight families' published ones, each with a small tokenizer.

The Jinja text is our own. `prompt` and `trained` are written by hand for the conversation below: what a template writes
up to the assistant's last turn, and what of "Yes." is trained on, which ends with the family's end of turn.
"""

from dataclasses import dataclass

from conftest import byte_level, sentencepiece
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye?"},
]


def answer(text):
    """Make a turn of the assistant."""
    return {"role": "assistant", "content": text}


@dataclass(frozen=True)
class Family:
    """A template, the special tokens of its tokenizer, and what it writes for the conversation above."""

    template: str
    tokens: tuple[str, ...]
    eos: str
    prompt: str
    trained: str
    end_of_turn: str
    bos: str | None = None
    n_bos: int = 0  # in a rendered prompt
    system: bool = True  # whether the template has a place for a system turn
    pieces: bool = False  # whether the tokenizer is of sentencepiece's kind, else byte-level

    def tokenizer(self):
        """Make the tokenizer."""
        if self.pieces:
            backend = sentencepiece(self.bos, *self.tokens, prepend=False)
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        else:
            backend = byte_level(*self.tokens, *([self.bos] if self.bos else []))
        own = {"bos_token": self.bos, "eos_token": self.eos}
        made = PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in own.items() if v})
        made.chat_template = self.template
        return made

    def turns(self):
        """Return the conversation that the family has a place for."""
        return [SYSTEM, *TURNS] if self.system else TURNS


CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""

LLAMA3 = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}"""

# The system turn goes into the last turn of the user, and turns must alternate.
MISTRAL = """\
{%- set ns = namespace(system='', n=0) -%}
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' %}{% set ns.system = m.content + '\n\n' -%}
{%- else -%}
{%- if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
{%- set ns.n = ns.n + 1 -%}
{%- set last = messages | selectattr('role', 'equalto', 'user') | list | last -%}
{%- if m.role == 'user' %}{{ '[INST] ' + (ns.system if m is sameas last else '') + m.content + '[/INST]' -}}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif -%}
{%- endif -%}
{%- endfor -%}"""

GEMMA = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
{%- set name = 'model' if m.role == 'assistant' else m.role -%}
{{- '<start_of_turn>' + name + '\n' + m.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif -%}"""

# An end of text follows where no answer is asked for.
PHI = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}"""

# Thoughts of earlier turns are left out, and the last answer always has a place for them.
QWEN = """\
{%- set last = namespace(user=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
{%- set text = m.content.split('</think>') | last if m.role == 'assistant' else m.content -%}
{%- set text = text.lstrip('\n') if m.role == 'assistant' else text -%}
{%- set thought = m.content.split('</think>')[0].split('<think>') | last if '</think>' in m.content else '' -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' and loop.index0 > last.user %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
{%- endif -%}
{{- text + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""

ZEPHYR = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif -%}"""

# Only the assistant's turns have an end, and a line break where another turn follows.
TULU = """\
{%- for m in messages -%}
{{- '<|' + m.role + '|>\n' + m.content -}}
{%- if m.role == 'assistant' %}{{ eos_token }}{% endif -%}
{%- if not (m.role == 'assistant' and loop.last) %}{{ '\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif -%}"""

END = "<|endoftext|>"
CHATML_PROMPT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>"
    "\n<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\n"
)
FAMILIES = {
    "ChatML": Family(CHATML, (END, "<|im_start|>", "<|im_end|>"), END, CHATML_PROMPT, "Yes.<|im_end|>", "<|im_end|>"),
    "Llama-3": Family(
        LLAMA3,
        ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nHi.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yes.<|eot_id|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        n_bos=1,
    ),
    "Mistral": Family(
        MISTRAL,
        ("</s>", "[INST]", "[/INST]"),
        "</s>",
        "<s>[INST] Hi.[/INST] Hello.</s>[INST] Be brief.\n\nBye?[/INST]",
        " Yes.</s>",
        "</s>",
        bos="<s>",
        n_bos=1,
        pieces=True,
    ),
    "Gemma": Family(
        GEMMA,
        ("<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<bos><start_of_turn>user\nHi.<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n<start_of_turn>user\n"
        "Bye?<end_of_turn>\n<start_of_turn>model\n",
        "Yes.<end_of_turn>",
        "<end_of_turn>",
        bos="<bos>",
        n_bos=1,
        system=False,
        pieces=True,
    ),
    "Phi": Family(
        PHI,
        (END, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        END,
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi.<|end|>\n<|assistant|>\nHello.<|end|>\n<|user|>\nBye?<|end|>\n"
        "<|assistant|>\n",
        "Yes.<|end|>",
        "<|end|>",
        bos="<s>",
    ),
    "Qwen": Family(
        QWEN,
        (END, "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        CHATML_PROMPT,
        "<think>\n\n</think>\n\nYes.<|im_end|>",
        "<|im_end|>",
    ),
    "Zephyr": Family(
        ZEPHYR,
        ("</s>",),
        "</s>",
        "<|system|>\nBe brief.</s>\n<|user|>\nHi.</s>\n<|assistant|>\nHello.</s>\n<|user|>\nBye?</s>\n<|assistant|>\n",
        "Yes.</s>",
        "</s>",
        bos="<s>",
        pieces=True,
    ),
    "Tulu": Family(
        TULU,
        (END,),
        END,
        f"<|system|>\nBe brief.\n<|user|>\nHi.\n<|assistant|>\nHello.{END}\n<|user|>\nBye?\n<|assistant|>\n",
        f"Yes.{END}",
        END,
    ),
}
