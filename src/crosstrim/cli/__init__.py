"""The command line: `crosstrim VERB`. Data goes to stdout, everything else to stderr."""

import sys

import crosstrim


def main() -> None:
    """Run the command line."""
    try:
        # Here and not above: Ctrl-C is heard while these are imported as well.
        from crosstrim.cli import streams

        with streams.checked():
            # Scripts ask for it often, and the program takes ten times as long to import.
            if sys.argv[1:] == ["--version"]:
                print(f"crosstrim {crosstrim.__version__}")
                return
            from crosstrim.cli import program

            program.app(prog_name="crosstrim")
    except KeyboardInterrupt:
        sys.exit(130)
