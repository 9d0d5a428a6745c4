"""What storage says, as errors that name the object and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from pipeline.errors import ConfigError, InputError, StorageError

_BACKENDS = {"adlfs", "aiohttp", "azure", "gcsfs", "google", "httpx", "httpx2", "huggingface_hub"}
"""Packages of fsspec's backends, which have errors of their own beside OSError."""


_NO_CREDENTIALS = (
    "no credentials were found. Set them in the environment (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or a profile or role)."
)


@contextmanager
def reading(url: str, done: str = "read") -> Iterator[None]:
    """Turn what storage says into errors that name the object and the fix."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(
            f"{url}: there is no such file, directory or bucket. Check the spelling."
        ) from None
    except NoCredentialsError as err:
        raise InputError(f"{url}: {_NO_CREDENTIALS}") from err
    except PermissionError as err:
        raise InputError(
            f"{url}: permission denied ({err}). The credentials in the environment may not read "
            "it: check the key, the bucket's policy and AWS_ENDPOINT_URL."
        ) from err
    except Exception as err:
        if not _of_storage(err):
            raise
        raise InputError(f"{url}: cannot be {done}{_why(err)}") from err


@contextmanager
def changing(url: str, what: str) -> Iterator[None]:
    """Turn what storage says of a write into StorageError, which names the object."""
    try:
        yield
    except NoCredentialsError as err:
        raise StorageError(f"{url}: {what}: {_NO_CREDENTIALS}") from err
    except Exception as err:
        if not _of_storage(err):
            raise
        raise StorageError(f"{url}: {what}{_why(err)}") from err


@contextmanager
def using_output() -> Iterator[None]:
    """Before anything is scored, an output that cannot be used is a mistake in the config."""
    try:
        yield
    except (StorageError, InputError) as err:
        raise ConfigError(
            f"output: {str(err).rstrip('.')}. Check the path, the credentials in the environment "
            "and the bucket's policy."
        ) from err


def _of_storage(err: Exception) -> bool:
    """Whether storage says so, and not a mistake of ours."""
    known = isinstance(err, (OSError, BotoCoreError, ClientError))
    return known or type(err).__module__.partition(".")[0] in _BACKENDS


def no_parquet(err: Exception) -> bool:
    """Whether pyarrow says that bytes make no sense: its OSErrors have no number, a store's do."""
    return isinstance(err, ValueError) or (type(err) is OSError and err.errno is None)


def is_outage(err: BaseException) -> bool:
    """Whether the store is to blame, not what it holds: it does not answer, or forbids the read."""
    cause: BaseException | None = err
    while isinstance(cause, Exception):
        of_content = isinstance(cause, FileNotFoundError) or no_parquet(cause)
        if _of_storage(cause) and not of_content:
            return True
        cause = cause.__cause__
    return False


def _why(err: BaseException) -> str:
    """` after 6 attempts: SlowDown: Please reduce your request rate.`, as far as it is known."""
    said, attempts = str(err), 0
    cause: BaseException | None = err
    while cause is not None:
        attempts = attempts or getattr(cause, "attempts", 0)
        if isinstance(cause, ClientError):
            answer = cause.response
            said = "{Code}: {Message}".format_map({"Message": "", **answer.get("Error", {})})
            retries = answer.get("ResponseMetadata", {}).get("RetryAttempts", 0)
            attempts = attempts or retries + 1
        cause = cause.__cause__
    if not attempts:
        return f": {said}"
    return f" after {attempts} attempt{'s' if attempts > 1 else ''}: {said}"
