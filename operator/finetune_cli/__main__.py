"""`finetune`: the command line."""

from __future__ import annotations

import sys

import typer
from kubernetes.client import ApiException
from kubernetes.config import ConfigException
from urllib3.exceptions import HTTPError

from finetune_api.validation import InvalidDocument

from .app import app


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 the job failed, 2 wrong input or not there, 130 interrupted."""
    from finetune_operator.cluster.errors import APIError

    from .cluster import Refused
    from .local import MissingVolume
    from .options import NotPossible
    from .preview import NoSamples
    from .queues import WrongInput
    from .runs import NoSuchRun

    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except typer.Abort:
        sys.exit(130)
    except InvalidDocument as failure:
        for error in failure.errors:
            print(error, file=sys.stderr)
    except ApiException as failure:
        print(Refused(failure), file=sys.stderr)
    except (APIError, MissingVolume, NoSamples, NoSuchRun, NotPossible, WrongInput) as failure:
        print(failure, file=sys.stderr)
    except ConfigException as failure:
        print(f"no cluster: {failure}", file=sys.stderr)
    except HTTPError as failure:
        print(f"the cluster does not answer: {failure}", file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as failure:
        if not hasattr(failure, "exit_code") or not hasattr(failure, "format_message"):
            raise
        failure.show()  # type: ignore[attr-defined]  # click's usage errors, whose class typer carries itself
        sys.exit(failure.exit_code)
    sys.exit(2)


if __name__ == "__main__":
    main()
