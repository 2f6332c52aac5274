"""Beam's job server as a process of its own, with `--direct_num_workers` workers: Beam's own takes one, always."""

import logging
import sys

from apache_beam.options.pipeline_options import DirectOptions
from apache_beam.portability.api import beam_job_api_pb2
from apache_beam.runners.portability import local_job_service, local_job_service_main
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner


class Job(local_job_service.BeamJob):
    def _invoke_runner(self):
        self.set_state(beam_job_api_pb2.JobState.RUNNING)
        options = self.pipeline_options()
        runner = FnApiRunner(provision_info=self._provision_info)
        runner._num_workers = int(options.view_as(DirectOptions).direct_num_workers)
        return runner.run_via_runner_api(self._pipeline_proto, options)


class Servicer(local_job_service.LocalJobServicer):
    def __init__(self, staging_dir=None):
        super().__init__(staging_dir, Job)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    local_job_service.LocalJobServicer = Servicer
    local_job_service_main.run(sys.argv[1:])
