"""An S3 server in this process, with one bucket. It can be stopped and restarted."""

from __future__ import annotations

import logging
import socket
import threading
from uuid import uuid4

import boto3
from moto.server import ThreadedMotoServer
from pyarrow import fs


class Bucket:
    """A bucket on a server in this process. The server can be stopped; the contents are kept."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.name = f"bucket-{uuid4().hex}"
        self.start()
        self.key = {"aws_access_key_id": "key", "aws_secret_access_key": "not a secret", "region_name": "us-east-1"}
        self.url = f"http://127.0.0.1:{self.port}"
        boto3.client("s3", endpoint_url=self.url, **self.key).create_bucket(Bucket=self.name)

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    def gone_for(self, seconds: float) -> None:
        """Stops the server now, and restarts it after `seconds`."""
        self.stop()
        threading.Timer(seconds, self.start).start()

    def filesystem(self) -> fs.S3FileSystem:
        """The bucket as an Arrow file system, without Arrow's retries, which take seconds."""
        return fs.S3FileSystem(
            access_key="key",
            secret_key="not a secret",
            region="us-east-1",
            scheme="http",
            endpoint_override=f"127.0.0.1:{self.port}",
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        )

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a process finds the bucket as `s3://NAME`."""
        known = {name.replace("region_name", "aws_region").upper(): value for name, value in self.key.items()}
        return known | {"AWS_ENDPOINT_URL": self.url}
