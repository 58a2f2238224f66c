"""Ray's token authentication: a process sends a cluster's token where the cluster asks for one, and none elsewhere.

Ray leaves that to RAY_AUTH_MODE. Without it an address gets no token though one is here, and the connection fails after
20 seconds; with it, and a cluster that asks for none, Ray Data's tasks cannot report to this process, and it waits for
ever (2.60). So each connection asks its cluster first, and sets the mode by the answer.
"""

import os
import secrets
from collections.abc import Callable
from typing import Any

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_PATIENCE = 20.0  # seconds in which a head that has just started answers
REMEDY = (
    f"set {_TOKEN} to the cluster's token, or {_PATH} to a file that has it, or write it to ~/.ray/auth_token. On the "
    "head node `ray get-auth-token` prints it; of KubeRay: kubectl get secret NAME_OF_THE_RAYCLUSTER "
    "-o jsonpath='{.data.auth_token}' | base64 -d"
)
_before: dict[str, str | None] = {}  # the variables that this module has changed, as they were


def of_a_local_ray() -> None:
    """Give a Ray that this process starts a token that only it and its children know.

    Without one Ray would write ~/.ray/auth_token, and each `ray start --head` on this machine would then ask for it.
    """
    if os.environ.get(_MODE, "token").lower() == "token":
        _set({_MODE: "token", _TOKEN: secrets.token_hex(32)})


def agree_with_cluster(address: str) -> None:
    """Send the token to the Ray cluster at `host:port` if it asks for one.

    Raises PermissionError where it asks for one that is not here, and ConnectionError where no cluster answers.
    """
    try:
        import grpc  # comes with jest[cluster]
    except ImportError:
        return
    from ray._private.grpc_utils import init_grpc_channel

    _set({_MODE: "disabled"})  # so that the channel has no token of its own
    with init_grpc_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive", bytes, bytes)

        def refuses(headers: dict[str, str]) -> bool:
            try:
                ask(b"", timeout=_PATIENCE, wait_for_ready=True, metadata=list(headers.items()))
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise ConnectionError(
                        f"no Ray cluster answers at {address} within {_PATIENCE:.0f} s: correct RAY_ADDRESS, or start "
                        "the head node first; without RAY_ADDRESS jest starts Ray on this machine"
                    ) from None
                return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
            return False

        _agree(f"the Ray cluster at {address}", refuses)


def agree_with_dashboard(address: str) -> None:
    """The same for the dashboard at a URL."""
    import requests  # comes with jest[cluster]

    def refuses(headers: dict[str, str]) -> bool:
        try:
            answer = requests.get(f"{address.rstrip('/')}/api/version", headers=headers, timeout=_PATIENCE)
        except requests.RequestException as error:
            raise ConnectionError(str(error)) from error
        return answer.status_code in (401, 403) and "authentication token" in answer.text  # not a proxy's own refusal

    _agree(f"the Ray dashboard at {address}", refuses)


def restore() -> None:
    """Leave the environment as it was before this process spoke to a Ray."""
    if _before:
        _set(dict(_before))
        _before.clear()


def _agree(where: str, refuses: Callable[[dict[str, str]], bool]) -> None:
    if not refuses({}):
        _set({_MODE: "disabled"})
        return
    token = _loader().get_token_for_http_header(ignore_auth_mode=True)
    if not token:
        raise PermissionError(f"{where} asks for a token, and there is none here: {REMEDY}")
    if refuses(token):
        raise PermissionError(f"{where} refuses the token of {_source()}, which may be another cluster's: {REMEDY}")
    _set({_MODE: "token"})


def _source() -> str:
    """Where Ray takes the token from."""
    if os.environ.get(_TOKEN):
        return f"the variable {_TOKEN}"
    return f"{_PATH}={os.environ[_PATH]}" if os.environ.get(_PATH) else "~/.ray/auth_token"


def _set(values: dict[str, str | None]) -> None:
    """Change variables, of which Ray keeps copies."""
    from ray import _raylet

    for name, value in values.items():
        _before.setdefault(name, os.environ.get(name))
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    raylet: Any = _raylet
    raylet.Config.initialize("")
    _loader().reset_cache()


def _loader() -> Any:
    from ray import _raylet

    raylet: Any = _raylet
    return raylet.AuthenticationTokenLoader.instance()
