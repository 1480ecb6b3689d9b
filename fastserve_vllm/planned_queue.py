"""A waiting queue that vLLM fills and FastServe orders."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request


class PlannedQueue(RequestQueue):
    """Holds every waiting request, but offers vLLM only those that the step's plan lets in.

    vLLM asks three things of a queue: that `bool()` says whether there is something to pop, that
    `peek_request` shows what `pop_request` will return, and that `len()` counts all that wait.
    Here the first two speak of the plan and the last of everybody. All operations cost O(1).
    """

    def __init__(self) -> None:
        self._requests: dict[Request, None] = {}
        self._planned: deque[Request] = deque()

    def plan(self, requests: Collection[Request]) -> None:
        """Offer those of `requests` that are in the queue, in this order."""
        if not requests and not self._planned:
            return
        held = self._requests
        self._planned = deque([request for request in requests if request in held])

    def add_request(self, request: Request) -> None:
        """Hold the request; it is not offered until it is planned."""
        self._requests[request] = None

    def pop_request(self) -> Request:
        """Remove and return the next planned request."""
        request = self._planned.popleft()
        del self._requests[request]
        return request

    def peek_request(self) -> Request:
        """The next planned request."""
        return self._planned[0]

    def prepend_request(self, request: Request) -> None:
        """Hold the request; its place is the policy's business."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Hold the requests; their places are the policy's business."""
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """Drop the request if it is here."""
        if self._requests.pop(request, self) is None and request in self._planned:
            self._planned.remove(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Drop those of the requests that are here."""
        for request in requests:
            self.remove_request(request)

    def __contains__(self, request: object) -> bool:
        return request in self._requests

    def __bool__(self) -> bool:
        return bool(self._planned)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)
