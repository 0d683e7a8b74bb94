package milepost

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	milepostv1 "milepost/clients/go/milepost/v1"
)

// Limits of a request. A larger event is sent alone.
const (
	batchEvents = 500
	batchBytes  = 900 << 10
)

// toldJobs is the number of jobs that a publisher remembers for OnCancellationRequested.
const toldJobs = 10_000

// The codes with which the server refuses events for their content.
var refusals = []codes.Code{
	codes.InvalidArgument, codes.NotFound, codes.AlreadyExists,
	codes.FailedPrecondition, codes.Aborted, codes.OutOfRange,
}

// ErrClosed is the error of the methods of a publisher after Close.
var ErrClosed = errors.New("milepost: the publisher is closed")

// PublisherOptions are the limits of a publisher and the functions that it calls, each of which
// may be nil. The functions are called one at a time, and must not call the publisher.
type PublisherOptions struct {
	// MaxEvents is the number of events that the publisher holds when Append waits. 0: 10,000.
	MaxEvents int
	// MaxBytes is the size of the encoded events that the publisher holds when Append waits.
	// The last event before may exceed it. 0: 16 MiB.
	MaxBytes int
	// MaxRequests is the largest number of requests in flight. 0: 16.
	MaxRequests int
	// AttemptTimeout is the deadline of each request. 0: 10 s.
	AttemptTimeout time.Duration

	// OnStored is called for each stored event, in the order of its job.
	OnStored func(job Job, event *milepostv1.AppendedEvent)
	// OnRefused is called for each event that the server refuses. Without it Flush and Close
	// return the first refusal.
	OnRefused func(job Job, event *milepostv1.NewEvent, err error)
	// OnInterruption is called before a request is sent again.
	OnInterruption func(err error, pause time.Duration)
	// OnCancellationRequested is called when the customer of a job has asked to stop it, with the
	// time of this, after the first answer that says so. A publisher calls it once for a job. It
	// can call it again if answers said so of 10,000 other jobs since the job's last answer. A
	// publisher of a restarted program calls it again.
	OnCancellationRequested func(job Job, requestedAt time.Time)
}

// Publisher appends events to jobs. The events of a job are stored in the order of the calls of
// Append. The publisher sends an event again, with the same id, until the server has stored or
// refused it. A refused event does not hold up later events. Any other error, such as
// UNAUTHENTICATED, fails the publisher: its methods return this error from then on. Several
// goroutines may call the methods.
type Publisher struct {
	client  milepostv1.EventServiceClient
	options PublisherOptions
	ctx     context.Context
	cancel  context.CancelFunc

	callbacks sync.Mutex  // Locked while a function of the options is called.
	told      *recentJobs // Those of which OnCancellationRequested was told.

	mu      sync.Mutex
	changed *sync.Cond
	queues  map[Job]*queue
	ready   []*queue      // The queues that have events and no worker.
	workers int           // Each has at most one request in flight.
	events  *atomic.Int64 // The events that are held.
	bytes   int
	closed  bool
	failure error
	refusal error // The first one that Flush has not returned.
}

// queue has the events of one job that are not sent yet. It exists while the publisher holds
// events of the job.
type queue struct {
	job      Job
	events   []*milepostv1.NewEvent
	appended int
	answered int
}

// NewPublisher returns a publisher over a connection. Close ends it.
func NewPublisher(conn grpc.ClientConnInterface, options PublisherOptions) *Publisher {
	options.MaxEvents = cmp.Or(options.MaxEvents, 10_000)
	options.MaxBytes = cmp.Or(options.MaxBytes, 16<<20)
	options.MaxRequests = cmp.Or(options.MaxRequests, 16)
	options.AttemptTimeout = cmp.Or(options.AttemptTimeout, 10*time.Second)
	p := &Publisher{
		client:  milepostv1.NewEventServiceClient(conn),
		options: options,
		told:    newRecentJobs(toldJobs),
		queues:  map[Job]*queue{},
		events:  new(atomic.Int64),
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.changed = sync.NewCond(&p.mu)
	// Workers refer to their publisher, so that only a failed one can be collected with events.
	runtime.AddCleanup(p, func(events *atomic.Int64) {
		if n := events.Load(); n > 0 {
			slog.Warn("milepost: a publisher failed and was not closed: its events may not be stored", "events", n)
		}
	}, p.events)
	return p
}

// Append adds an event to the queue of a job, and returns before the event is sent. It waits
// while the publisher holds its maximum. It copies the event, and gives an id to the copy if the
// event has none. Name a job always by the same one of its ids: each id has a queue of its own.
func (p *Publisher) Append(ctx context.Context, job Job, event *milepostv1.NewEvent) error {
	event = proto.CloneOf(event)
	if event.Id == "" {
		event.Id = uuid.Must(uuid.NewV7()).String()
	}
	if (job.ID == "") == (job.ProviderJobID == "") {
		return invalid("an event needs a job, by one of its ids")
	}
	// grpc reports a text that is not UTF-8 as INTERNAL, like a broken connection.
	if _, err := proto.Marshal(newRequest(job, []*milepostv1.NewEvent{event})); err != nil {
		return invalid("the event cannot be encoded: %v", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.wait(ctx, func() bool {
		return p.closed || p.events.Load() < int64(p.options.MaxEvents) && p.bytes < p.options.MaxBytes
	})
	if err != nil {
		return err
	}
	if p.closed {
		return ErrClosed
	}
	p.events.Add(1)
	p.bytes += proto.Size(event)
	q := p.queues[job]
	if q == nil {
		q = &queue{job: job}
		p.queues[job] = q
		p.ready = append(p.ready, q)
		if p.workers < p.options.MaxRequests {
			p.workers++
			go p.work()
		}
	}
	q.events = append(q.events, event)
	q.appended++
	return nil
}

// Flush returns when all events that were appended before are stored or refused. Without
// OnRefused it returns the first refusal since the last flush.
func (p *Publisher) Flush(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	targets := map[*queue]int{}
	for _, q := range p.queues {
		targets[q] = q.appended
	}
	err := p.wait(ctx, func() bool {
		for q, appended := range targets {
			if q.answered < appended {
				return false
			}
			delete(targets, q)
		}
		return true
	})
	if refusal := p.refusal; refusal != nil {
		p.refusal = nil
		return errors.Join(refusal, err)
	}
	return err
}

// Close flushes and ends the publisher. If the context ends before, Close ends the publisher all
// the same, and the error tells how many events may not be stored.
func (p *Publisher) Close(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return ErrClosed
	}
	p.closed = true
	p.changed.Broadcast()
	p.mu.Unlock()
	err := p.Flush(ctx)
	p.mu.Lock()
	if n := p.events.Swap(0); n > 0 {
		err = fmt.Errorf("milepost: the publisher was closed with %d events that may not be stored: %w", n, err)
	}
	p.failure = ErrClosed
	p.cancel()
	p.changed.Broadcast()
	for p.workers > 0 {
		p.changed.Wait()
	}
	return err
}

// wait returns nil when the condition holds. The caller has locked mu.
func (p *Publisher) wait(ctx context.Context, condition func() bool) error {
	if p.failure == nil && !condition() {
		defer context.AfterFunc(ctx, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.changed.Broadcast()
		})()
	}
	for {
		switch {
		case p.failure != nil:
			return p.failure
		case condition():
			return nil
		case ctx.Err() != nil:
			return newError(ctx.Err())
		}
		p.changed.Wait()
	}
}

// work sends a batch of one ready queue after the other, until no queue is ready.
func (p *Publisher) work() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.failure == nil && len(p.ready) > 0 {
		q := p.ready[0]
		p.ready = slices.Delete(p.ready, 0, 1)
		batch, bytes := q.takeBatch()
		p.mu.Unlock()
		err := p.deliver(q.job, batch)
		p.mu.Lock()
		if err != nil {
			p.failure = cmp.Or(p.failure, err)
			p.cancel()
			break
		}
		p.events.Add(-int64(len(batch)))
		p.bytes -= bytes
		q.answered += len(batch)
		if len(q.events) > 0 {
			p.ready = append(p.ready, q)
		} else {
			delete(p.queues, q.job)
		}
		p.changed.Broadcast()
	}
	p.workers--
	p.changed.Broadcast()
}

func (q *queue) takeBatch() (batch []*milepostv1.NewEvent, bytes int) {
	for _, event := range q.events {
		size := proto.Size(event)
		if len(batch) == batchEvents || len(batch) > 0 && bytes+size > batchBytes {
			break
		}
		batch = append(batch, event)
		bytes += size
	}
	q.events = slices.Delete(q.events, 0, len(batch))
	return batch, bytes
}

// deliver returns nil when each event is stored or refused.
func (p *Publisher) deliver(job Job, events []*milepostv1.NewEvent) error {
	answer, failure := p.send(newRequest(job, events))
	switch {
	case failure == nil:
		p.tell(job, answer)
	case !slices.Contains(refusals, failure.Code):
		return failure
	case len(events) == 1:
		p.refuse(job, events[0], failure)
	default:
		for i := range events {
			if err := p.deliver(job, events[i:i+1]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *Publisher) tell(job Job, answer *milepostv1.AppendEventsResponse) {
	if p.options.OnStored == nil && p.options.OnCancellationRequested == nil {
		return
	}
	p.callbacks.Lock()
	defer p.callbacks.Unlock()
	if p.options.OnStored != nil {
		for _, event := range answer.GetEvents() {
			p.options.OnStored(job, event)
		}
	}
	requestedAt := answer.GetCancellationRequestedAt()
	if p.options.OnCancellationRequested != nil && requestedAt != nil && p.told.add(job) {
		p.options.OnCancellationRequested(job, requestedAt.AsTime())
	}
}

func (p *Publisher) refuse(job Job, event *milepostv1.NewEvent, failure *Error) {
	if p.options.OnRefused != nil {
		p.callbacks.Lock()
		defer p.callbacks.Unlock()
		p.options.OnRefused(job, event, failure)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refusal == nil {
		p.refusal = fmt.Errorf("event %s of job %s was refused: %w", event.GetId(), job.ID+job.ProviderJobID, failure)
	}
}

// send sends a request until it is answered.
func (p *Publisher) send(request *milepostv1.AppendEventsRequest) (*milepostv1.AppendEventsResponse, *Error) {
	var pauses pauses
	for {
		ctx, cancel := context.WithTimeout(p.ctx, p.options.AttemptTimeout)
		answer, err := p.client.AppendEvents(ctx, request)
		cancel()
		if err == nil {
			return answer, nil
		}
		failure := newError(err)
		if p.ctx.Err() != nil || !failure.transient() {
			return nil, failure
		}
		pause := pauses.next(failure)
		if p.options.OnInterruption != nil {
			p.callbacks.Lock()
			p.options.OnInterruption(failure, pause)
			p.callbacks.Unlock()
		}
		if sleep(p.ctx, pause) != nil {
			return nil, failure
		}
	}
}

// recentJobs has the jobs that were added last. Each is known at least until count others were
// added.
type recentJobs struct {
	count         int
	current, past map[Job]bool
}

func newRecentJobs(count int) *recentJobs {
	return &recentJobs{count: count, current: map[Job]bool{}}
}

// add returns whether the job was not known.
func (r *recentJobs) add(job Job) bool {
	isNew := !r.current[job] && !r.past[job]
	r.current[job] = true
	if len(r.current) >= r.count {
		r.current, r.past = map[Job]bool{}, r.current
	}
	return isNew
}

func newRequest(job Job, events []*milepostv1.NewEvent) *milepostv1.AppendEventsRequest {
	request := &milepostv1.AppendEventsRequest{Events: events}
	if job.ID != "" {
		request.Job = &milepostv1.AppendEventsRequest_JobId{JobId: job.ID}
	} else {
		request.Job = &milepostv1.AppendEventsRequest_ProviderJobId{ProviderJobId: job.ProviderJobID}
	}
	return request
}
