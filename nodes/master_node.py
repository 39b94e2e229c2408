"""What the three Master nodes have in common: they hand a job to a worker, and wait for it or not.

Owns that. The classes that ComfyUI knows are in master.py, master3.py and master6.py.

    configuration, inputs ──▶ dry run │ submit ──▶ wait ──▶ campaign, output_1 ... output_N
                                             └──▶ campaign alone (async): Join waits
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from legion_shm.errors import ConfigError
from legion_shm.nodes.any_type import ANY
from legion_shm.nodes.importer import CHANNELS
from legion_shm.nodes.link_types import LEGION_CAMPAIGN, LEGION_CONFIG

__all__ = ["MasterNode", "master_outputs"]

_log = logging.getLogger("legion_shm.nodes")

_NOT_YET = (
    "this Master runs its workflow in the background (asynch); take the outputs from a Legion: Join Campaign "
    "node that is connected to its legion_campaign"
)


def master_outputs(channels: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """RETURN_TYPES and RETURN_NAMES of a Master with so many channels."""
    names = ("legion_campaign", *(f"output_{n}" for n in range(1, channels + 1)))
    return (LEGION_CAMPAIGN, *(ANY,) * channels), names


class MasterNode:
    """Runs a workflow in a worker, with its inputs 1 to N, and gives what the worker's exporter delivers."""

    CHANNELS: ClassVar[int] = CHANNELS
    FUNCTION = "execute"
    CATEGORY = "Legion"
    DESCRIPTION = (
        "Runs a workflow in a worker process: its inputs reach the worker's Legion: Importer, and what the "
        "Legion: Exporter there gets comes back at the outputs."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        from legion_shm.nodes.folders import Folders, workflow_names
        from legion_shm.nodes.worker_workflow import FROM_CONFIGURATION

        files = [FROM_CONFIGURATION, *workflow_names(Folders.current())]
        return {
            "optional": {
                "legion_config": (LEGION_CONFIG,),
                "legion_campaign": (LEGION_CAMPAIGN,),
                **{f"input_{n}": (ANY,) for n in range(1, cls.CHANNELS + 1)},
                "workflow": (
                    files,
                    {
                        "default": FROM_CONFIGURATION,
                        "tooltip": "A file from the folders of worker workflows.",
                    },
                ),
                "workflow_text": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "dynamicPrompts": False,
                        "tooltip": "A worker's workflow, as saved or in the API format; goes before a file.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, workflow: object = None) -> bool:  # noqa: N802 - the protocol's name
        """A file that is gone is told of, with its folders, when the node runs and needs it."""
        return True

    @classmethod
    def IS_CHANGED(  # noqa: N802 - the protocol's name
        cls,
        workflow: str | None = "",
        workflow_text: str | None = "",
        unique_id: object = None,
        **_: object,
    ) -> str | float:
        """The content of the chosen file, of all where its name comes over a link (None); and how many runs
        gave out what is of no use any more.
        """
        from legion_shm.nodes.campaign import count_spent
        from legion_shm.nodes.worker_workflow import FROM_CONFIGURATION, fingerprint, fingerprint_of_all

        spent = count_spent(None if unique_id is None else str(unique_id))
        if workflow is None and not (workflow_text or "").strip():
            return f"{fingerprint_of_all()}:{spent}"
        name = None if workflow == FROM_CONFIGURATION else workflow
        content = fingerprint(text=workflow_text or "", name=name)
        return content if isinstance(content, float) else f"{content}:{spent}"

    def execute(
        self,
        legion_config: Any = None,
        legion_campaign: Any = None,
        workflow: str | None = None,
        workflow_text: str | None = None,
        unique_id: object = None,
        **inputs: object,
    ) -> tuple[object, ...]:
        from legion_shm.nodes.bridge import blocked, cancel_on_interruption, forwarded_data
        from legion_shm.nodes.campaign import Campaign, numbered_outputs, remember
        from legion_shm.nodes.shared_supervisor import spec_for, submit
        from legion_shm.nodes.worker_workflow import FROM_CONFIGURATION, check_channels, load_worker_workflow
        from legion_shm.supervisor.resolve import resolve_spec

        configuration = chosen_configuration(legion_config, legion_campaign)
        given = {name: inputs[name] for name in _channel_names(self.CHANNELS) if name in inputs}
        if configuration.dry_run:
            _log.info(
                "Legion: dry run (execution.dry_run: true): nothing was run, %s come back as outputs",
                ", ".join(given) or "no inputs",
            )
            outputs = {name.replace("input", "output"): value for name, value in given.items()}
            return Campaign(configuration, outputs=outputs), *numbered_outputs(outputs, self.CHANNELS)
        spec = resolve_spec(spec_for(configuration))
        prompt = load_worker_workflow(
            text=workflow_text or "",
            name=configuration.workflow if workflow in (None, "", FROM_CONFIGURATION) else workflow,
            spec=spec,
        )
        check_channels(prompt, given)
        job = submit(
            prompt,
            inputs=given,
            spec=spec,
            deadline_s=configuration.deadline_s,
            retries=configuration.retries,
            extra_data=forwarded_data(spec.extra_args),
            remote=True,
        )
        campaign = Campaign(configuration, job=job, nodes=len(prompt))
        remember(None if unique_id is None else str(unique_id), campaign)
        if configuration.asynch:
            cancel_on_interruption(job)
            return campaign, *(blocked(_NOT_YET),) * self.CHANNELS
        result = campaign.wait()
        _tell_left_out(result, self.CHANNELS)
        return campaign, *numbered_outputs(result, self.CHANNELS)


def chosen_configuration(legion_config: Any, legion_campaign: Any) -> Any:
    """The configuration, from the one input that is connected. Raises ConfigError for none and for both."""
    if (legion_config is None) == (legion_campaign is None):
        given = "both are" if legion_config is not None else "none is"
        raise ConfigError(f"connect either legion_config or legion_campaign; {given} connected")
    return legion_config if legion_campaign is None else legion_campaign.configuration


def _channel_names(channels: int) -> list[str]:
    return [f"input_{n}" for n in range(1, channels + 1)]


def _tell_left_out(outputs: Any, channels: int) -> None:
    shown = {f"output_{n}" for n in range(1, channels + 1)}
    left = [name for name in outputs if name not in shown]
    if left:
        _log.warning(
            "Legion: the worker delivered %s, for which this Master has no output; a Master with more "
            "channels, or Legion: Join Campaign, gives output_1 to output_%d",
            ", ".join(left),
            CHANNELS,
        )
