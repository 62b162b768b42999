"""`memlane` with the fake engine in place of the real worker."""

from __future__ import annotations

import sys
from pathlib import Path

from memlane_server import cli, engine_client, serve

engine_client.FIRST_BACKOFF = 0.1  # tests need not wait for a machine to recover

real_run = serve.run
serve.run = lambda engine, config: real_run(  # type: ignore[assignment,misc]
    engine, config, [sys.executable, str(Path(__file__).with_name("fake_engine.py"))]
)
sys.exit(cli.main())
