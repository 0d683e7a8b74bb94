package milepost

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/structpb"

	milepostv1 "milepost/clients/go/milepost/v1"
)

// requests records the requests of AppendEvents. A request that is sent again is one batch.
type requests struct {
	mu       sync.Mutex
	inFlight map[string]int
	total    int
	most     int
	batches  []*milepostv1.AppendEventsRequest
	problems []string
}

func (r *requests) intercept(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	batch := request.(*milepostv1.AppendEventsRequest)
	r.mu.Lock()
	if !slices.Contains(r.batches, batch) {
		r.batches = append(r.batches, batch)
	}
	r.inFlight[batch.GetJobId()]++
	r.total++
	r.most = max(r.most, r.total)
	if r.inFlight[batch.GetJobId()] > 1 {
		r.problems = append(r.problems, "two requests of one job")
	}
	r.mu.Unlock()
	err := invoke(ctx, method, request, reply, conn, options...)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inFlight[batch.GetJobId()]--
	r.total--
	return err
}

func appendTo(t *testing.T, publisher *Publisher, job Job, events ...*milepostv1.NewEvent) {
	t.Helper()
	for _, event := range events {
		if err := publisher.Append(t.Context(), job, event); err != nil {
			t.Error(err)
		}
	}
}

func numbers(from, to int) (names []string) {
	for i := from; i <= to; i++ {
		names = append(names, strconv.Itoa(i))
	}
	return names
}

func TestEachJobKeepsItsOrder(t *testing.T) {
	sent := &requests{inFlight: map[string]int{}}
	b := newBench(t, grpc.WithUnaryInterceptor(sent.intercept))
	jobs := []Job{b.job, b.newJob(), b.newJob(), b.newJob()}
	stored := map[Job][]int64{}
	publisher := NewPublisher(b.conn, PublisherOptions{
		MaxRequests: 2,
		OnStored:    func(job Job, event *milepostv1.AppendedEvent) { stored[job] = append(stored[job], event.Sequence) },
	})
	names := numbers(1, 300)
	for _, name := range names {
		for _, job := range jobs {
			appendTo(t, publisher, job, info(name))
		}
	}
	if err := publisher.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, job := range jobs {
		assertEqual(t, b.stored(job), names)
		for i, sequence := range stored[job] {
			if sequence != int64(i+1) {
				t.Fatalf("event %d was reported at sequence %d", i+1, sequence)
			}
		}
	}
	if len(sent.problems) > 0 || sent.most > 2 {
		t.Errorf("%v, %d in flight", sent.problems, sent.most)
	}
}

func TestWhatIsAppendedMeanwhileBecomesTheNextBatches(t *testing.T) {
	large := info("large")
	large.Metadata = must(structpb.NewStruct(map[string]any{"text": strings.Repeat("x", 16_000)}))
	for _, test := range []struct {
		event   *milepostv1.NewEvent
		count   int
		batches []int
	}{{info("small"), 1002, []int{1, 500, 500, 1}}, {large, 100, []int{1, 57, 42}}} {
		sent := &requests{inFlight: map[string]int{}}
		b := newBench(t, grpc.WithUnaryInterceptor(sent.intercept))
		stored := 0
		publisher := NewPublisher(b.conn, PublisherOptions{
			OnStored: func(Job, *milepostv1.AppendedEvent) { stored++ },
		})
		b.proxy.stall(true)
		appendTo(t, publisher, b.job, test.event)
		eventually(t, "the first request", func() bool {
			sent.mu.Lock()
			defer sent.mu.Unlock()
			return len(sent.batches) == 1
		})
		for range test.count - 1 {
			appendTo(t, publisher, b.job, test.event)
		}
		b.proxy.stall(false)
		if err := publisher.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if stored != test.count {
			t.Errorf("%d events were stored before the flush returned", stored)
		}
		if err := publisher.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		var sizes []int
		for _, batch := range sent.batches {
			sizes = append(sizes, len(batch.Events))
		}
		assertEqual(t, sizes, test.batches)
		if test.event.Id != "" {
			t.Error("the event of the caller was changed")
		}
	}
}

func TestOnlyTheEventAtFaultIsRefused(t *testing.T) {
	b := newBench(t)
	var refusals []string
	publisher := NewPublisher(b.conn, PublisherOptions{
		OnRefused: func(_ Job, event *milepostv1.NewEvent, err error) {
			failure, _ := errors.AsType[*Error](err)
			refusals = append(refusals, fmt.Sprintf("%s %s %s", event.Name[:4], failure.Code, failure.Reason))
		},
	})
	b.proxy.stall(true)
	appendTo(t, publisher, b.job, info("1"), info("2"), refused(), info("3"), info(strings.Repeat("x", 2<<20)), complete(), info("late"))
	appendTo(t, publisher, Job{ProviderJobID: "unknown"}, info("lost"))
	b.proxy.stall(false)
	if err := publisher.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	assertEqual(t, b.stored(b.job), []string{"1", "2", "3", "complete"})
	slices.Sort(refusals)
	assertEqual(t, refusals, []string{
		"late FailedPrecondition JOB_CLOSED", "lost NotFound RESOURCE_NOT_FOUND",
		"xxxx InvalidArgument FIELD_INVALID", "xxxx OutOfRange ",
	})
	if err := publisher.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestFlushReturnsTheFirstRefusalOnce(t *testing.T) {
	b := newBench(t)
	publisher := NewPublisher(b.conn, PublisherOptions{})
	appendTo(t, publisher, b.job, refused(), info("1"))
	err := publisher.Flush(t.Context())
	failure, ok := errors.AsType[*Error](err)
	if !ok || failure.Code != codes.InvalidArgument || len(failure.Violations) != 1 {
		t.Fatalf("the error is %v", err)
	}
	if field := failure.Violations[0].Field; !strings.Contains(err.Error(), field) || !strings.Contains(err.Error(), b.job.ID) {
		t.Errorf("%q does not name %s", err, field)
	}
	assertEqual(t, b.stored(b.job), []string{"1"})
	if err := publisher.Flush(t.Context()); err != nil {
		t.Errorf("the second flush returned %v", err)
	}
	if err := publisher.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestARequestedCancellationIsToldOnceForEachNameOfAJob(t *testing.T) {
	b := newBench(t)
	found := must(milepostv1.NewJobServiceClient(b.other).GetJob(t.Context(),
		&milepostv1.GetJobRequest{Job: &milepostv1.GetJobRequest_JobId{JobId: b.job.ID}}))
	byProvider, other := Job{ProviderJobID: found.Job.ProviderJobId}, b.newJob()
	told := map[Job][]time.Time{}
	options := PublisherOptions{
		OnCancellationRequested: func(job Job, requestedAt time.Time) { told[job] = append(told[job], requestedAt) },
	}
	publisher := NewPublisher(b.conn, options)
	appendToAll := func(name string) {
		for _, job := range []Job{b.job, byProvider, other} {
			appendTo(t, publisher, job, info(name))
		}
		if err := publisher.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	appendToAll("before")
	if len(told) > 0 {
		t.Errorf("told before: %v", told)
	}
	at := b.requestCancellation(b.job)
	for _, name := range []string{"after", "later"} {
		appendToAll(name)
		if len(told) != 2 {
			t.Errorf("told of %v", told)
		}
		assertEqual(t, told[b.job], []time.Time{at})
		assertEqual(t, told[byProvider], []time.Time{at})
	}
	if err := publisher.Close(t.Context()); err != nil {
		t.Fatal(err)
	}

	restarted := NewPublisher(b.conn, options)
	appendTo(t, restarted, b.job, info("restarted"))
	if err := restarted.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	assertEqual(t, told[b.job], []time.Time{at, at})
}

func TestAJobIsKnownUntilSoManyOthersWereAddedAndTheirNumberIsBounded(t *testing.T) {
	for before := range 3 {
		jobs := newRecentJobs(3)
		for i := range before {
			jobs.add(Job{ID: fmt.Sprint("before ", i)})
		}
		var known []string
		for _, id := range []string{"a", "b", "c", "a", "b", "c", "a"} {
			if !jobs.add(Job{ID: id}) {
				known = append(known, id)
			}
		}
		assertEqual(t, known, []string{"a", "b", "c", "a"})
		if !jobs.add(Job{ProviderJobID: "a"}) {
			t.Error("another name of a job is known")
		}
		for i := range 100 {
			jobs.add(Job{ID: fmt.Sprint("after ", i)})
			if len(jobs.current)+len(jobs.past) > 6 {
				t.Fatalf("%d jobs are known", len(jobs.current)+len(jobs.past))
			}
		}
		if !jobs.add(Job{ID: "a"}) {
			t.Error("an old job is known")
		}
	}
}

func TestAppendRefusesWhatCannotBeSent(t *testing.T) {
	b := newBench(t)
	publisher := NewPublisher(b.conn, PublisherOptions{})
	defer publisher.Close(t.Context())
	for _, test := range []struct {
		job   Job
		event *milepostv1.NewEvent
	}{{Job{}, info("1")}, {Job{ID: "a", ProviderJobID: "b"}, info("1")}, {b.job, info("\xff")}, {Job{ID: "\xff"}, info("1")}} {
		if err := publisher.Append(t.Context(), test.job, test.event); newError(err).Code != codes.InvalidArgument {
			t.Errorf("%v: %v", test, err)
		}
	}
}

func TestAppendWaitsWhileThePublisherIsFull(t *testing.T) {
	large := info("large")
	large.Metadata = must(structpb.NewStruct(map[string]any{"text": strings.Repeat("x", 1000)}))
	for name, options := range map[string]PublisherOptions{"events": {MaxEvents: 3}, "bytes": {MaxBytes: 3000}} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			publisher := NewPublisher(b.conn, options)
			b.proxy.stall(true)
			appendTo(t, publisher, b.job, large, large, large)
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if err := publisher.Append(ctx, b.job, info("1")); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("the error of the fourth event is %v", err)
			}
			if err := publisher.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the error of the flush is %v", err)
			}
			b.proxy.stall(false)
			appendTo(t, publisher, b.job, info("2"))
			if err := publisher.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			assertEqual(t, b.stored(b.job), []string{"large", "large", "large", "2"})
		})
	}
}

func TestAttemptsWithoutAnAnswerAreRepeatedWithTheSameIds(t *testing.T) {
	sent := &requests{inFlight: map[string]int{}}
	b := newBench(t, grpc.WithUnaryInterceptor(sent.intercept))
	var codesSeen []codes.Code
	publisher := NewPublisher(b.conn, PublisherOptions{
		AttemptTimeout: time.Second,
		OnInterruption: func(err error, _ time.Duration) {
			if codesSeen = append(codesSeen, newError(err).Code); len(codesSeen) == 2 {
				b.proxy.stall(false)
			}
		},
	})
	appendTo(t, publisher, b.job, info("1"))
	if err := publisher.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	codesSeen = nil
	b.proxy.stall(true)
	appendTo(t, publisher, b.job, info("2"), info("3"))
	if err := publisher.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	assertEqual(t, b.stored(b.job), []string{"1", "2", "3"})
	if !slices.Contains(codesSeen, codes.DeadlineExceeded) {
		t.Errorf("the interruptions are %v", codesSeen)
	}
	if len(sent.problems) > 0 {
		t.Error(sent.problems)
	}
}

func TestAWrongKeyFailsThePublisher(t *testing.T) {
	b := newBench(t)
	conn := must(Dial(b.proxy.address, "mpk_wrong"))
	defer conn.Close()
	publisher := NewPublisher(conn, PublisherOptions{})
	appendTo(t, publisher, b.job, info("1"))
	for range 2 {
		if err := publisher.Flush(t.Context()); newError(err).Reason != "CREDENTIAL_INVALID" {
			t.Errorf("the error of the flush is %v", err)
		}
	}
	if err := publisher.Append(t.Context(), b.job, info("2")); newError(err).Reason != "CREDENTIAL_INVALID" {
		t.Errorf("the error of the append is %v", err)
	}
	err := publisher.Close(t.Context())
	failure, ok := errors.AsType[*Error](err)
	if !ok || failure.Reason != "CREDENTIAL_INVALID" || !strings.Contains(err.Error(), "1 events") {
		t.Errorf("the error of the close is %v", err)
	}
}

func TestCloseTellsHowManyEventsMayNotBeStored(t *testing.T) {
	sent := &requests{inFlight: map[string]int{}}
	b := newBench(t, grpc.WithUnaryInterceptor(sent.intercept))
	publisher := NewPublisher(b.conn, PublisherOptions{MaxEvents: 2})
	b.proxy.stall(true)
	appendTo(t, publisher, b.job, info("1"), info("2"))
	waiting := make(chan error)
	go func() { waiting <- publisher.Append(context.Background(), b.job, info("3")) }()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err := publisher.Close(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "2 events") {
		t.Errorf("the error is %v", err)
	}
	if sent.total > 0 {
		t.Errorf("%d requests are in flight after the close", sent.total)
	}
	for _, err := range []error{
		<-waiting, publisher.Append(t.Context(), b.job, info("4")), publisher.Flush(t.Context()), publisher.Close(t.Context()),
	} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("the error after the close is %v", err)
		}
	}
}

func TestAnAbandonedPublisherSaysThatItHasEvents(t *testing.T) {
	b := newBench(t)
	var mu sync.Mutex
	var log bytes.Buffer
	previous := slog.Default()
	defer slog.SetDefault(previous)
	slog.SetDefault(slog.New(slog.NewTextHandler(writer(func(line []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return log.Write(line)
	}), nil)))
	conn := must(Dial(b.proxy.address, "mpk_wrong"))
	defer conn.Close()
	appendTo(t, NewPublisher(conn, PublisherOptions{}), b.job, info("1"))
	eventually(t, "the message", func() bool {
		runtime.GC()
		mu.Lock()
		defer mu.Unlock()
		return strings.Contains(log.String(), "events=1")
	})
}

type writer func([]byte) (int, error)

func (w writer) Write(line []byte) (int, error) { return w(line) }
