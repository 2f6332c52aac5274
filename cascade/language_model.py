"""Open a language model for generation: a run, one of its checkpoints, any model folder, or a name on the Hub."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from lacy.cascade.vocabulary import Vocabulary, open_vocabulary
from lacy.labelers.llm.model_folders import resolve
from lacy.schemas.errors import CascadeError
from lacy.trainer.checkpoint import newest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Model:
    """A language model with its tokenizer, ready to read and write.

    folder   the checkpoint
    begin    ids in front of every text: what its tokenizer puts there, else, for a model with <CALL>, the end token,
             which precedes each document in training
    end_id   the token that ends a text; None if its tokenizer names none
    end_ids  all tokens that end a text
    call_id  <CALL>; None if it is not in the vocabulary
    context  number of tokens that it can read
    """

    folder: Path
    network: PreTrainedModel
    vocabulary: Vocabulary
    begin: tuple[int, ...]
    end_id: int | None
    end_ids: frozenset[int]
    call_id: int | None
    context: int

    @property
    def device(self) -> torch.device:
        return self.network.device

    def begun(self, ids: list[int]) -> list[int]:
        """A text's ids as the model reads them; never empty."""
        return [*self.begin, *ids] or [0 if self.end_id is None else self.end_id]

    def forbidden(self) -> list[int]:
        """Ids that it must not write: <CALL>, other special tokens that do not end a text, and ids without a token."""
        return self.vocabulary.forbidden(self.network.get_output_embeddings().weight.shape[0], self.end_ids)


def checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run's folder; a checkpoint or another model folder itself.

    Raises CascadeError if there is none.
    """
    if (run / "config.json").is_file():
        return run
    latest = newest(run)
    if latest is None:
        raise CascadeError(
            f"{run} is neither a run with a checkpoint nor a model folder: lacy train --out makes a run", usage=True
        )
    return latest


def results_folder(folder: Path) -> Path:
    """The folder for evaluations of a checkpoint: in its run's folder, as checkpoints get deleted."""
    if folder.parent.name == "checkpoints":
        return folder.parent.parent / "eval" / folder.name
    return folder / "eval"


def open_model(run: Path | str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> Model:
    """Load the model of a run (`checkpoint`) or a Hub name, in evaluation mode.

    dtype  float32, bfloat16, float16; auto: float32 on a CPU and for models with <CALL>, whose scores need it, else
           bfloat16

    Raises CascadeError or ModelError if it cannot be loaded.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise CascadeError(f"unknown --dtype {dtype}: use auto, {', '.join(DTYPES)}", usage=True)
    if device not in ("auto", "cpu") and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise CascadeError(f"--device {device} is not available: use cpu, or cuda on a machine with a GPU", usage=True)
    target = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    folder = checkpoint(Path(run)) if Path(run).is_dir() else Path(run)
    name = resolve(str(folder))
    vocabulary, begin, end_id = open_vocabulary(name, trust_remote_code=trust_remote_code)
    narrow = dtype == "auto" and target.type == "cuda" and vocabulary.call_id is None
    kind = DTYPES["bfloat16" if narrow else "float32" if dtype == "auto" else dtype]
    try:
        network = AutoModelForCausalLM.from_pretrained(
            name, dtype=kind, attn_implementation="sdpa", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the library may raise anything
        raise CascadeError(f"cannot open the model {name}: {' '.join(str(error).split())[:300]}") from None
    network.requires_grad_(False)
    network.eval().to(target)
    config = network.config.get_text_config()
    more = network.generation_config.eos_token_id if network.generation_config else None
    end_ids = frozenset([*([end_id] if end_id is not None else []), *(more if isinstance(more, list) else [more])])
    if not begin and vocabulary.call_id is not None and end_id is not None:
        begin = (end_id,)
    return Model(
        folder=folder,
        network=network,
        vocabulary=vocabulary,
        begin=begin,
        end_id=end_id,
        end_ids=end_ids - {None},
        call_id=vocabulary.call_id,
        context=getattr(config, "max_position_embeddings", None) or 2048,
    )
