"""Open the small model and its partner as the options say."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lacy.cascade.calls import read_fitted
from lacy.cascade.language_model import Model, open_model
from lacy.cascade.options import DeviceOptions, GenerateOptions, PartnerOptions
from lacy.cascade.partners import Amount, InProcess, Partner, Patient, Server, Vllm
from lacy.cascade.vocabulary import open_vocabulary
from lacy.labelers.llm.model_folders import resolve
from lacy.schemas.errors import UsageError


@contextmanager
def open_cascade(
    run: str, who: PartnerOptions, how: GenerateOptions, device: DeviceOptions
) -> Iterator[tuple[Model, Partner | None, GenerateOptions]]:
    """The small model, its partner (None for "none"), and the options with the weight of the combined score.

    Raises CascadeError and ModelError where one of them cannot be opened.
    """
    model, settled = open_slm(run, who, how, device)
    with open_partner(model, who, settled) as partner:
        yield model, partner, settled


def open_slm(
    run: str, who: PartnerOptions, how: GenerateOptions, device: DeviceOptions
) -> tuple[Model, GenerateOptions]:
    folder = Path(run)
    model = open_model(folder.absolute() if folder.is_dir() else resolve(run), **device.model_dump())
    if how.call_score != "combined" or "weight" in how.model_fields_set or who.partner == "none":
        return model, how
    fitted = read_fitted(model.folder)
    if fitted is None:
        raise UsageError(f"the combined score has no weight yet: lacy eval delegation {run} --fit, or --weight")
    return model, how.model_copy(update={"weight": fitted.weight})


@contextmanager
def open_partner(model: Model, who: PartnerOptions, how: GenerateOptions) -> Iterator[Partner | None]:
    """A partner that survives its failures; None for "none"."""
    if who.partner == "none":
        yield None
        return
    opened, close = _open(model, who, Amount(who.partner_tokens, who.partner_words), how)
    partner = Patient(opened)
    try:
        yield partner
    finally:
        partner.close()
        close()


def _open(model: Model, who: PartnerOptions, amount: Amount, how: GenerateOptions) -> tuple[Any, Callable[[], None]]:
    """A partner, and what frees its engine."""
    sampling, trust = how.sampling, who.trust_remote_code
    if who.partner.startswith(("http://", "https://")):
        from lacy.labelers.llm.client import api_key, base_url

        known: dict[str, Any] = {}
        if who.partner_tokenizer:
            vocabulary, begin, end = open_vocabulary(resolve(who.partner_tokenizer), trust_remote_code=trust)
            known = {"vocabulary": vocabulary, "begin": begin, "ends": frozenset() if end is None else {end}}
        server = Server(
            base_url(who.partner), who.partner_model, model.vocabulary, amount, sampling,
            key=api_key(), timeout=who.partner_timeout, **known,
        )  # fmt: skip
        return server, lambda: None
    name = resolve(who.partner)
    if who.partner_engine == "vllm":
        from lacy.labelers.llm.vllm_scorer import close_engine, open_engine

        vocabulary, begin, end = open_vocabulary(name, trust_remote_code=trust)
        engine = open_engine(name, "auto", 1, trust, {"max_num_seqs": how.batch, "enable_prefix_caching": True})
        ends = frozenset() if end is None else frozenset([end])
        partner = Vllm(who.partner, engine, vocabulary, begin, ends, model.vocabulary, amount, sampling)
        return partner, lambda: close_engine(engine)
    larger = open_model(name, device=model.device.type, trust_remote_code=trust)
    return InProcess(larger, model.vocabulary, amount, sampling, slots=how.batch), lambda: None
