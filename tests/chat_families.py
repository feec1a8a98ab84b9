"""Chat templates with the observable behaviour of twelve families' published ones, each with a small tokenizer.

The Jinja text is our own. `prompt` and `trained` are written by hand for the conversation below: what a template writes
up to the assistant's last turn, and what of "Yes." is trained on, which ends with the family's end of turn. Templates
that read the clock see TIME.
"""

from dataclasses import dataclass
from datetime import datetime

from conftest import byte_level, sentencepiece
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

TIME = datetime(2026, 1, 31, 12)
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
    thought: str = ""  # that an answer must begin with, since the generation prompt opens it
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

# Thoughts in their own key or before the content; tools, calls and what tools returned.
QWEN3 = """\
{%- if tools %}
{{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') + '# Tools\n' -}}
{%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor -%}
{{- '<|im_end|>\n' -}}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif -%}
{%- set ns = namespace(last=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
{%- if m.role in ('user', 'developer') %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' -%}
{%- set content = m.content -%}
{%- set thought = m.reasoning_content or '' -%}
{%- if not thought and '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > ns.last and (loop.last or thought) -%}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}
{%- else %}{{ content }}{% endif -%}
{%- for call in m.tool_calls or [] -%}
{%- set call = call.function or call -%}
{{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- elif m.role == 'tool' -%}
{%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is false else '') -}}
{%- endif -%}"""

# Never writes a thought but opens one where an answer is asked for; arguments of calls are texts.
R1 = """\
{{- bos_token -}}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' %}{{ '<|User|>' + m.content }}{% endif -%}
{%- if m.role == 'assistant' -%}
{{- '<|Assistant|>' + m.content.split('</think>')[-1] -}}
{%- for call in m.tool_calls or [] -%}
{{- '<|call|>' + call.function.name + '\n' + call.function.arguments + '<|end of call|>' -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- if m.role == 'tool' %}{{ '<|output|>' + m.content + '<|end of output|>' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif -%}"""

# Each part of a turn is a message with its own channel, and what ends it depends on what follows.
GPT_OSS = """\
{{- '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: ' -}}
{{- (reasoning_effort or 'medium') + '<|end|>' -}}
{%- set first = messages[0].content if messages[0].role in ('system', 'developer') else '' -%}
{%- if first or tools -%}
{{- '<|start|>developer<|message|>' + first -}}
{%- for tool in tools or [] -%}
{%- set tool = tool.function or tool -%}
{{- '\n// ' + (tool.description or '') + '\ntype ' + tool.name + ' = (' + (tool.parameters or {}) | tojson + ')' -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- set ns = namespace(name='') -%}
{%- for m in messages -%}
{%- if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif -%}
{%- if m.role == 'assistant' and m.tool_calls -%}
{%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif -%}
{%- if m.content %}{{ '<|start|>assistant<|channel|>commentary<|message|>' + m.content + '<|end|>' }}{% endif -%}
{%- set call = m.tool_calls[0].function or m.tool_calls[0] -%}
{%- set ns.name = call.name -%}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary<|message|>' + call.arguments | tojson -}}
{{- '<|call|>' -}}
{%- elif m.role == 'assistant' -%}
{%- if loop.last and not add_generation_prompt and m.thinking -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}
{%- endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content -}}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}
{%- endif -%}
{%- if m.role == 'tool' -%}
{{- '<|start|>functions.' + ns.name + ' to=assistant<|message|>' + m.content | tojson + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif -%}"""

# The date is in the system turn and the tools are in the first turn of the user; a call ends in another way.
LLAMA31 = """\
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' -}}
{{- (date_string if date_string is defined else strftime_now('%d %b %Y')) + '\n\n' -}}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif -%}
{{- '<|eot_id|>' -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' -}}
{%- if m.tool_calls -%}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call per turn') }}{% endif -%}
{%- set call = m.tool_calls[0].function -%}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eom_id|>' -}}
{%- else -%}
{%- if loop.first and tools %}{{ 'Call one of these:\n' + tools | tojson(indent=4) + '\n\n' }}{% endif -%}
{{- (m.content | tojson if m.role == 'tool' else m.content | trim) + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}"""

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
    "Qwen3": Family(
        QWEN3,
        (END, "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        CHATML_PROMPT,
        "<think>\n\n</think>\n\nYes.<|im_end|>",
        "<|im_end|>",
    ),
    "R1": Family(
        R1,
        ("<|end|>", "<|User|>", "<|Assistant|>", "<|call|>", "<|end of call|>", "<|output|>", "<|end of output|>"),
        "<|end|>",
        "<|begin|>Be brief.<|User|>Hi.<|Assistant|>Hello.<|end|><|User|>Bye?<|Assistant|><think>\n",
        "Well.\n</think>\n\nYes.<|end|>",
        "<|end|>",
        bos="<|begin|>",
        n_bos=1,
        thought="Well.\n</think>\n\n",
    ),
    "gpt-oss": Family(
        GPT_OSS,
        ("<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
        "<|return|>",
        "<|start|>system<|message|>Date: 2026-01-31\n\nReasoning: medium<|end|><|start|>developer<|message|>Be brief."
        "<|end|><|start|>user<|message|>Hi.<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|end|><|start|>"
        "user<|message|>Bye?<|end|><|start|>assistant",
        "<|channel|>final<|message|>Yes.<|return|>",
        "<|return|>",
    ),
    "Llama-3.1": Family(
        LLAMA31,
        ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 31 Jan 2026\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Hello.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n",
        "Yes.<|eot_id|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        n_bos=1,
    ),
}
