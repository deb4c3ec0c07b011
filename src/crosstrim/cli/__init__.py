"""The command line: `crosstrim VERB`. Data goes to stdout, everything else to stderr."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        # Here and not above: these imports take seconds, and Ctrl-C is heard in them as well.
        from crosstrim.cli import program, streams

        with streams.checked():
            program.app(prog_name="crosstrim")
    except KeyboardInterrupt:
        sys.exit(130)
