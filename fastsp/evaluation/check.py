"""Before the training: whether the evaluation of the finished run will find what it needs. Imports little."""

from pathlib import Path

from fastsp.config import Config
from fastsp.data.source import check_path
from fastsp.errors import UserError
from fastsp.evaluation.captions_file import read_captions
from fastsp.evaluation.reference import heldout_data
from fastsp.evaluation.settings import absent_files

_OR_NONE = "or set evaluation.enabled=false"


def check_evaluation(config: Config) -> str | None:
    """See that a run's `evaluation` section can be followed, if it is.

    Returns:
        What to tell of files that are absent, which is no error: they may come yet, and without them it is skipped.

    Raises:
        UserError: a key is missing, or names something of another kind.
    """
    settings, data = config.evaluation, config.data
    if not settings.enabled:
        return None
    if absent := absent_files(settings):
        return f"{', '.join(absent)} is not there: unless it comes, the evaluation after the training is skipped"
    if settings.captions is not None:
        read_captions(Path(settings.captions), settings.num_samples)
        other_than_digits = settings.features != "classifier" or config.model.pretrained is not None
        if other_than_digits and settings.reference is None:
            raise UserError(
                f"evaluation.reference is missing: a folder of real pictures, or saved statistics; {_OR_NONE}"
            )
    elif data.source == "latents":
        raise UserError(f"evaluation.captions is missing: with data.source=latents there are no pictures; {_OR_NONE}")
    elif data.source != "digits":
        heldout = heldout_data(data, settings.heldout)
        try:
            check_path(heldout)
        except UserError as error:
            raise UserError(str(error).replace("data.path", "evaluation.heldout")) from None
    return None
