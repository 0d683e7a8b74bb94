package milepost

import (
	"context"
	"io"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	milepostv1 "milepost/clients/go/milepost/v1"
)

// WatchOptions are functions that a watch calls, each of which may be nil. The goroutine that
// ranges over the events calls them, between events and in the order of the messages.
type WatchOptions struct {
	// OnCaughtUp is called when all events of the past were handed out: once after the start
	// and once after each resume. In a watch of one job the message has the state of the job and
	// of each step.
	OnCaughtUp func(message *milepostv1.CaughtUp)
	// OnHeartbeat is called for each heartbeat.
	OnHeartbeat func()
	// OnInterruption is called before the watch pauses and resumes.
	OnInterruption func(err error, pause time.Duration)
}

// Watcher is a watch of one job or of all jobs. Only one goroutine at a time may use it.
type Watcher struct {
	ctx     context.Context
	client  milepostv1.EventServiceClient
	request *milepostv1.WatchEventsRequest // Starts after the last message that was received.
	options WatchOptions
	silence time.Duration

	pending   []*milepostv1.Event // Of the last message.
	processed string
	end       *milepostv1.WatchEnd
}

// Watch prepares a watch, which [Watcher.Events] starts. The request has the jobs and the kinds
// to watch, the start and the heartbeat interval. A watch that receives nothing for two heartbeat
// intervals and 5 s resumes. When the context ends, the watch ends with the context's error.
func Watch(ctx context.Context, conn grpc.ClientConnInterface, request *milepostv1.WatchEventsRequest, options WatchOptions) *Watcher {
	interval := 15 * time.Second
	if request.GetHeartbeatInterval() != nil {
		interval = min(max(request.HeartbeatInterval.AsDuration(), 5*time.Second), time.Minute)
	}
	return &Watcher{
		ctx:       ctx,
		client:    milepostv1.NewEventServiceClient(conn),
		request:   proto.CloneOf(request),
		options:   options,
		silence:   2*interval + 5*time.Second,
		processed: request.GetResumeToken(),
	}
}

// ResumeToken returns the token of the last message whose events were all processed, which means
// that the loop has asked for the next event. A watch that starts with it continues after this
// message. It is empty before the first message.
func (w *Watcher) ResumeToken() string { return w.processed }

// End returns the final state of the watched job after the watch has ended, and nil before.
func (w *Watcher) End() *milepostv1.JobState { return w.end.GetJob() }

// Events returns the events: each one once, and those of each job in order. The loop ends after
// the last event of a closed job. An error is the last element, and is an [*Error]. Leaving the
// loop ends the call to the server; another loop continues with the next event.
func (w *Watcher) Events() iter.Seq2[*milepostv1.Event, error] {
	return func(yield func(*milepostv1.Event, error) bool) {
		// grpc reports a text that is not UTF-8 as INTERNAL, like a broken connection.
		if _, err := proto.Marshal(w.request); err != nil {
			yield(nil, invalid("the request cannot be encoded: %v", err))
			return
		}
		var pauses pauses
		for w.handOut(yield) && w.end == nil {
			interruption := w.follow(yield, &pauses)
			if interruption == nil {
				return
			}
			pause := pauses.next(interruption)
			if w.options.OnInterruption != nil {
				w.options.OnInterruption(interruption, pause)
			}
			if err := sleep(w.ctx, pause); err != nil {
				yield(nil, err)
				return
			}
		}
	}
}

// follow makes one call. It returns the error after which the watch resumes, or nil if the loop
// is over.
func (w *Watcher) follow(yield func(*milepostv1.Event, error) bool, pauses *pauses) *Error {
	ctx, cancel := context.WithCancelCause(w.ctx)
	defer cancel(nil)
	// Runs only while the watch waits for the server.
	silence := time.AfterFunc(w.silence, func() {
		cancel(status.Errorf(codes.DeadlineExceeded, "the server sent nothing for %v", w.silence))
	})
	defer silence.Stop()

	answered := false
	stream, err := w.client.WatchEvents(ctx, w.request)
	for err == nil {
		var message *milepostv1.WatchEventsResponse
		if message, err = stream.Recv(); err == nil {
			silence.Stop()
			answered = true
			pauses.last = 0
			if !w.take(message, yield) {
				return nil
			}
			silence.Reset(w.silence)
		}
	}

	switch {
	case w.ctx.Err() != nil:
		yield(nil, newError(w.ctx.Err()))
		return nil
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err == io.EOF:
		err = status.Error(codes.Unavailable, "the stream ended without its last message")
	}
	failure := newError(err)
	if failure.transient() || answered && failure.Reason == "" {
		return failure
	}
	yield(nil, failure)
	return nil
}

// take hands out the events of a message and calls the function for it. It returns false if the
// loop is over.
func (w *Watcher) take(message *milepostv1.WatchEventsResponse, yield func(*milepostv1.Event, error) bool) bool {
	w.request.Start = &milepostv1.WatchEventsRequest_ResumeToken{ResumeToken: message.GetResumeToken()}
	w.pending = message.GetEvents().GetEvents()
	if !w.handOut(yield) {
		return false
	}
	switch content := message.GetMessage().(type) {
	case *milepostv1.WatchEventsResponse_CaughtUp:
		if w.options.OnCaughtUp != nil {
			w.options.OnCaughtUp(content.CaughtUp)
		}
	case *milepostv1.WatchEventsResponse_Heartbeat:
		if w.options.OnHeartbeat != nil {
			w.options.OnHeartbeat()
		}
	case *milepostv1.WatchEventsResponse_End:
		// All other ends have a status, which tells what to do.
		if content.End.GetReason() == milepostv1.WatchEndReason_WATCH_END_REASON_JOB_CLOSED {
			w.end = content.End
		}
	}
	return w.end == nil
}

// handOut yields the rest of the last message's events. It returns false if the loop was left.
func (w *Watcher) handOut(yield func(*milepostv1.Event, error) bool) bool {
	for len(w.pending) > 0 {
		event := w.pending[0]
		w.pending = w.pending[1:]
		if !yield(event, nil) {
			return false
		}
	}
	w.processed = w.request.GetResumeToken()
	return true
}
