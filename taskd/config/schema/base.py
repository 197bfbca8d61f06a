"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr


def not_a_bool(value: object) -> object:
    # YAML reads `yes` and `on` as true, and true would pass for the number 1.
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Port = Annotated[int, BeforeValidator(not_a_bool), Field(ge=0, le=65535)]
PositiveInt = Annotated[int, BeforeValidator(not_a_bool), Field(gt=0)]
PositiveSeconds = Annotated[float, BeforeValidator(not_a_bool), Field(gt=0)]
GraceSeconds = Annotated[float, BeforeValidator(not_a_bool), Field(ge=0)]


def _host_and_port(value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("expected HOST:PORT, such as 127.0.0.1:50051")
    return value


Address = Annotated[str, AfterValidator(_host_and_port)]


def _worker_url(value: str) -> str:
    scheme, separator, rest = value.rstrip("/").partition("://")
    if not separator or scheme not in ("http", "https"):
        raise ValueError("expected http://HOST:PORT (https with TLS), such as http://10.0.0.7:50053")
    host, _, port = rest.rpartition(":")
    if not host or "/" in rest or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("expected http://HOST:PORT, such as http://10.0.0.7:50053")
    return f"{scheme}://{rest}"


WorkerUrl = Annotated[str, AfterValidator(_worker_url)]
Secret = Annotated[SecretStr, Field(min_length=1)]


class Section(BaseModel):
    """A part of the configuration; a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
