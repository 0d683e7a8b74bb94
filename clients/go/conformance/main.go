// Conformance watches jobs and publishes events to them, while the harness that runs it breaks
// connections and servers. It prints what it sees as JSON objects, one a line.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"log"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	milepost "milepost/clients/go"
	milepostv1 "milepost/clients/go/milepost/v1"
)

type line map[string]any

var output sync.Mutex

func show(l line) {
	output.Lock()
	defer output.Unlock()
	check(json.NewEncoder(os.Stdout).Encode(l))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func number(variable string) int {
	value, err := strconv.Atoi(os.Getenv(variable))
	check(err)
	return value
}

func main() {
	conn, err := milepost.Dial(os.Getenv("MILEPOST_SERVER"), os.Getenv("MILEPOST_API_KEY"))
	check(err)
	jobs := strings.Split(os.Getenv("MILEPOST_JOBS"), ",")
	var watches sync.WaitGroup
	for _, id := range jobs {
		watches.Go(func() {
			request := &milepostv1.WatchEventsRequest{Scope: &milepostv1.WatchEventsRequest_JobId{JobId: id}}
			end := watch(conn, id, request, -1)
			show(line{"kind": "end", "watch": id, "last_sequence": end.GetLastSequence()})
		})
	}
	watches.Go(func() {
		request := &milepostv1.WatchEventsRequest{Scope: &milepostv1.WatchEventsRequest_AllJobs{AllJobs: &milepostv1.AllJobs{}}}
		watch(conn, "all", request, len(jobs))
	})
	publish(conn, jobs)
	watches.Wait()
}

// watch shows a watch until it ends or has seen the completion of so many jobs.
func watch(conn *grpc.ClientConn, name string, request *milepostv1.WatchEventsRequest, jobs int) *milepostv1.JobState {
	request.HeartbeatInterval = durationpb.New(5 * time.Second)
	w := milepost.Watch(context.Background(), conn, request, milepost.WatchOptions{
		OnCaughtUp:     func(*milepostv1.CaughtUp) { show(line{"kind": "caught_up", "watch": name}) },
		OnHeartbeat:    func() { show(line{"kind": "heartbeat", "watch": name}) },
		OnInterruption: func(err error, _ time.Duration) { showInterruption(name, err) },
	})
	for event, err := range w.Events() {
		check(err)
		show(line{
			"kind": "event", "watch": name, "job": event.JobId,
			"sequence": event.Sequence, "id": event.Id, "name": event.Name,
		})
		if event.Name == "complete" {
			jobs--
		}
		if jobs == 0 {
			break
		}
	}
	return w.End()
}

func showInterruption(of string, err error) {
	show(line{"kind": "interruption", "watch": of, "error": err.Error()})
}

func publish(conn *grpc.ClientConn, jobs []string) {
	publisher := milepost.NewPublisher(conn, milepost.PublisherOptions{
		OnStored: func(job milepost.Job, event *milepostv1.AppendedEvent) {
			show(line{"kind": "stored", "job": job.ID, "sequence": event.Sequence, "id": event.Id})
		},
		OnRefused: func(job milepost.Job, event *milepostv1.NewEvent, err error) {
			failure, _ := errors.AsType[*milepost.Error](err)
			show(line{"kind": "refused", "job": job.ID, "id": event.Id, "reason": failure.Reason})
		},
		OnInterruption: func(err error, _ time.Duration) { showInterruption("publisher", err) },
		OnCancellationRequested: func(job milepost.Job, _ time.Time) {
			show(line{"kind": "cancellation_requested", "job": job.ID})
		},
	})
	appendToAll := func(kind milepostv1.EventKind, name string) {
		for _, id := range jobs {
			event := &milepostv1.NewEvent{Kind: kind, Name: name}
			check(publisher.Append(context.Background(), milepost.Job{ID: id}, event))
		}
	}
	for round := 1; round <= number("MILEPOST_ROUNDS"); round++ {
		appendToAll(milepostv1.EventKind_EVENT_KIND_INFO, strconv.Itoa(round))
		if round%10 == 0 {
			appendToAll(milepostv1.EventKind_EVENT_KIND_INFO, strings.Repeat("x", 300))
		}
		time.Sleep(time.Duration(number("MILEPOST_PAUSE_MS")) * time.Millisecond)
	}
	appendToAll(milepostv1.EventKind_EVENT_KIND_COMPLETE, "complete")
	check(publisher.Flush(context.Background()))
	show(line{"kind": "flushed"})
	check(publisher.Close(context.Background()))
}
